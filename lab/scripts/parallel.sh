# Direct 4 KiB reads and writes from several processes at once, two on each CPU: a writer that
# reads back what it wrote, and a reader of an area that is not written.
#   DISK             block device (/dev/vda)
#   PARALLEL_BLOCKS  4 KiB blocks in each process's area (256)
#   PARALLEL_ROUNDS  passes of each process over its area (4)
# Writers use the disk's beginning: process i blocks [i * PARALLEL_BLOCKS, (i+1) * PARALLEL_BLOCKS).
: "${DISK:=/dev/vda}" "${PARALLEL_BLOCKS:=256}" "${PARALLEL_ROUNDS:=4}"
set -eu
cpus=$(nproc)
written=$((cpus * PARALLEL_BLOCKS))

area() { # blocks [first, first + PARALLEL_BLOCKS), one request per block
    taskset -c "$1" dd if="$DISK" bs=4096 skip="$2" count="$PARALLEL_BLOCKS" iflag=direct \
        status=none
}

writer() {
    first=$(($1 * PARALLEL_BLOCKS))
    round=0
    while [ "$round" -lt "$PARALLEL_ROUNDS" ]; do
        dd if=/dev/urandom of="/tmp/written$1" bs=4096 count="$PARALLEL_BLOCKS" status=none
        taskset -c "$1" dd if="/tmp/written$1" of="$DISK" bs=4096 seek="$first" oflag=direct \
            conv=notrunc status=none || return 1
        area "$1" "$first" >"/tmp/back$1"
        cmp "/tmp/written$1" "/tmp/back$1" || return 1
        round=$((round + 1))
    done
}

reader() {
    first=$((written + $1 * PARALLEL_BLOCKS))
    round=0
    while [ "$round" -lt "$PARALLEL_ROUNDS" ]; do
        area "$1" "$first" >"/tmp/read$1"
        cmp "/tmp/known$1" "/tmp/read$1" || return 1
        round=$((round + 1))
    done
}

each_cpu() { # calls a function with every CPU's number
    cpu=0
    while [ "$cpu" -lt "$cpus" ]; do
        "$1" "$cpu"
        cpu=$((cpu + 1))
    done
}

learn() { area "$1" $((written + $1 * PARALLEL_BLOCKS)) >"/tmp/known$1"; }
begin() {
    writer "$1" &
    processes="$processes $!"
    reader "$1" &
    processes="$processes $!"
}

each_cpu learn
processes=
each_cpu begin
for process in $processes; do
    wait "$process" || { echo "process $process of $processes failed"; exit 1; }
done

echo "FACT parallel_cpus=$cpus"
echo "FACT parallel_queues=$(ls "/sys/block/${DISK##*/}/mq" | wc -l)"
echo "FACT parallel_requests=$((3 * cpus * PARALLEL_BLOCKS * PARALLEL_ROUNDS))"
echo "FACT parallel_bytes=$((written * 4096))"
sum=$(dd if="$DISK" bs=4096 count="$written" iflag=direct status=none | sha256sum)
echo "FACT parallel_sha256=${sum%% *}"
