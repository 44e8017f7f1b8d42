# Takes the disk's driver away and brings it back under load, again and again. Between two lives of
# the driver the guest uses the memory that the disk has left, so that a device that writes to what
# it had before is found out. At the end every area's sum is told.
#   DISK           block device (/dev/vda)
#   RELOADS        how often (10)
#   RELOAD_WAYS    in turn: "module" removes and inserts the module while readers and writers come
#                  to an end, "unbind" takes the device from the driver amid requests ("module unbind")
#   RELOAD_BLOCKS  4 KiB blocks of each area (64): a writer's, a reader's
#   RELOAD_CANARY  KiB of memory that is filled and checked between the lives (1024)
#   RELOAD_JOBS    writers, and readers (2)
# Writer i has blocks [i * RELOAD_BLOCKS, (i + 1) * RELOAD_BLOCKS); readers those after the writers.
: "${DISK:=/dev/vda}" "${RELOADS:=10}" "${RELOAD_WAYS:=module unbind}" "${RELOAD_BLOCKS:=64}"
: "${RELOAD_CANARY:=1024}" "${RELOAD_JOBS:=2}"
set -eu
name=${DISK##*/}
device=$(readlink -f "/sys/block/$name/device")
device=${device##*/}
driver=/sys/bus/virtio/drivers/virtio_blk
DISK=/tmp/disk

area() { # writes an area to standard output
    dd if="$DISK" bs=4096 skip="$1" count="$RELOAD_BLOCKS" iflag=direct status=none
}

# Compares what was read with what is known; a disk that goes away ends early.
as_known() {
    cmp -s "$1" "$2" && return
    [ -e /tmp/unbound ] || { echo "$2 differs from $1"; return 1; }
    head -c "$(stat -c %s "$2")" "$1" | cmp - "$2"
}

# Ends with status 0 when it was told to or the disk went away; else something was wrong.
writer() {
    first=$(($1 * RELOAD_BLOCKS))
    while [ -e /tmp/load ]; do
        dd if="/tmp/new$1" of="$DISK" bs=4096 seek="$first" oflag=direct conv=notrunc \
            status=none 2>/dev/null || { [ -e /tmp/unbound ] && return; return 1; }
        area "$first" >"/tmp/back$1" 2>/dev/null || { [ -e /tmp/unbound ] && return; return 1; }
        as_known "/tmp/new$1" "/tmp/back$1" || return 1
    done
}

reader() {
    first=$(((RELOAD_JOBS + $1) * RELOAD_BLOCKS))
    while [ -e /tmp/load ]; do
        area "$first" >"/tmp/read$1" 2>/dev/null || { [ -e /tmp/unbound ] && return; return 1; }
        as_known "/tmp/known$1" "/tmp/read$1" || return 1
    done
}

for_each_job() {
    job=0
    while [ "$job" -lt "$RELOAD_JOBS" ]; do
        "$@" "$job"
        job=$((job + 1))
    done
}

prepare() {
    dd if=/dev/urandom of="/tmp/new$1" bs=4096 count="$RELOAD_BLOCKS" status=none
    dd if="/tmp/new$1" of="$DISK" bs=4096 seek=$(($1 * RELOAD_BLOCKS)) oflag=direct conv=notrunc \
        status=none
    area $(((RELOAD_JOBS + $1) * RELOAD_BLOCKS)) >"/tmp/known$1"
}

begin() {
    writer "$1" &
    jobs="$jobs $!"
    reader "$1" &
    jobs="$jobs $!"
}

await() {
    for process in $jobs; do
        wait "$process" || { echo "a job failed in life $life ($way)"; exit 1; }
    done
}

canary() { # fills memory that was free, and looks at it until it is needed no more
    dd if=/dev/zero bs=1024 count="$RELOAD_CANARY" status=none | tr '\0' '\252' >/tmp/canary
}

check_canary() {
    sum=$(sha256sum </tmp/canary)
    [ "$sum" = "$canary_sum" ] || { echo "memory was written to in life $life ($way)"; exit 1; }
}

disk_is_there() {
    tries=0
    until [ -r "/sys/block/$name/dev" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "no disk in life $life ($way)"; exit 1; }
        usleep 10000
    done
    # A node of our own: /dev has none while the device is away, and dd would make a file there.
    IFS=: read -r major minor <"/sys/block/$name/dev"
    rm -f "$DISK"
    mknod "$DISK" b "$major" "$minor"
}

canary
canary_sum=$(sha256sum </tmp/canary)
life=0
way=boot
disk_is_there
for_each_job prepare
while [ "$life" -lt "$RELOADS" ]; do
    for way in $RELOAD_WAYS; do
        [ "$life" -lt "$RELOADS" ] || break
        life=$((life + 1))
        jobs=
        rm -f /tmp/unbound
        touch /tmp/load
        for_each_job begin
        usleep $((life % 5 * 20000 + 20000))
        if [ "$way" = unbind ]; then
            touch /tmp/unbound
            echo "$device" >"$driver/unbind"
            rm /tmp/load
            await
        else
            rm /tmp/load
            await
            rmmod virtio_blk
        fi
        rm /tmp/canary
        canary
        if [ "$way" = unbind ]; then
            echo "$device" >"$driver/bind"
        else
            insmod /lab/modules/virtio_blk.ko
        fi
        disk_is_there
        for_each_job prepare
        check_canary
        echo "FACT lives=$life"
    done
done
sum=$(dd if="$DISK" bs=4096 count=$((2 * RELOAD_JOBS * RELOAD_BLOCKS)) iflag=direct status=none |
    sha256sum)
echo "FACT reload_bytes=$((2 * RELOAD_JOBS * RELOAD_BLOCKS * 4096))"
echo "FACT reload_sha256=${sum%% *}"
