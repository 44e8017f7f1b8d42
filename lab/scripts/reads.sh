# Times direct 4 KiB reads of several disks in turn: one at a time, and from processes at once.
#   DISKS          block devices ("/dev/vda /dev/vdb")
#   READS_BLOCKS   blocks read one at a time (8000)
#   READS_READERS  processes that read at once (16)
#   READS_EACH     blocks that each of them reads (1000)
#   READS_ROUNDS   how often (5)
# Tells hundredths of seconds: reads_<disk>_<readers>_<round>.
: "${DISKS:=/dev/vda /dev/vdb}" "${READS_BLOCKS:=8000}" "${READS_READERS:=16}"
: "${READS_EACH:=1000}" "${READS_ROUNDS:=5}"
set -eu
mkfifo /tmp/start

now() { # hundredths of seconds since the boot, without starting a process
    read -r uptime _ </proc/uptime
    now=${uptime%.*}${uptime#*.}
}

reads() { # disk, first block, blocks
    dd if="$1" of=/dev/null bs=4096 skip="$2" count="$3" iflag=direct status=none
}

one() { # disk
    now
    began=$now
    reads "$1" 0 "$READS_BLOCKS"
    now
    echo "FACT reads_${1##*/}_1_$round=$((now - began))"
}

many() { # disk
    readers=
    i=0
    while [ "$i" -lt "$READS_READERS" ]; do
        # Opening a fifo waits for its other end: they all begin together.
        (: </tmp/start && reads "$1" $((i * READS_EACH)) "$READS_EACH") &
        readers="$readers $!"
        i=$((i + 1))
    done
    sleep 0.3
    now
    began=$now
    : >/tmp/start
    for reader in $readers; do
        wait "$reader" || { echo "a reader of $1 failed"; exit 1; }
    done
    now
    echo "FACT reads_${1##*/}_${READS_READERS}_$round=$((now - began))"
}

# What a disk does first takes longer.
for disk in $DISKS; do
    reads "$disk" 0 500
done
round=1
while [ "$round" -le "$READS_ROUNDS" ]; do
    for disk in $DISKS; do
        one "$disk"
        many "$disk"
    done
    turned=
    for disk in $DISKS; do
        turned="$disk $turned"
    done
    DISKS=$turned
    round=$((round + 1))
done
rm /tmp/start
