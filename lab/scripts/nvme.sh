# Waits for an NVMe disk, tells what Linux knows of it, and has it live through resets.
#   DISK           block device (/dev/nvme0n1)
#   DISK_LIVES     unbind and bind, so often (0)
#   DISK_RESETS    controller resets under load (0)
#   DISK_FLRS      function level resets under load (0)
#   DISK_LOAD      arguments of /lab/files/disk_load under load; without it there is none
: "${DISK:=/dev/nvme0n1}" "${DISK_LIVES:=0}" "${DISK_RESETS:=0}" "${DISK_FLRS:=0}"
: "${DISK_LOAD:=}"
set -eu
name=${DISK##*/}
controller=${name%n[0-9]*}

disk_is_there() {
    tries=0
    until [ -b "$DISK" ] && [ -r "/sys/block/$name/size" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "no disk in $1"; exit 1; }
        usleep 10000
    done
}

disk_is_there "the first life"
device=$(readlink -f "/sys/class/nvme/$controller/device")
function=${device##*/}
echo "FACT nvme_model=$(cat "/sys/class/nvme/$controller/model")"
echo "FACT nvme_serial=$(cat "/sys/class/nvme/$controller/serial")"
echo "FACT nvme_block=$(cat "/sys/block/$name/queue/logical_block_size")"
echo "FACT nvme_read_only=$(cat "/sys/block/$name/ro")"
echo "FACT nvme_disks=$(ls /sys/block | grep -c nvme)"
echo "FACT nvme_queues=$(ls "/sys/block/$name/mq" | wc -l)"
echo "FACT nvme_iommu=$(cat "$device/iommu_group/type" 2>/dev/null || echo none)"
echo "FACT nvme_interrupts=$(ls "$device/msi_irqs" 2>/dev/null | wc -l)"
if [ -e /lab/files/disk_load ]; then
    cp /lab/files/disk_load /tmp/disk_load
    chmod +x /tmp/disk_load
fi

live() { # what is done, how often, a function that does it
    count=0
    while [ "$count" -lt "$2" ]; do
        count=$((count + 1))
        "$3"
    done
    echo "FACT disk_$1=$count"
}

rebind() {
    echo "$function" >/sys/bus/pci/drivers/nvme/unbind
    echo "$function" >/sys/bus/pci/drivers/nvme/bind
    disk_is_there "life $count"
    dd if="$DISK" of=/dev/null bs=4096 count=4 iflag=direct status=none
}

reset_controller() {
    usleep $((count % 5 * 30000 + 30000))
    echo 1 >"/sys/class/nvme/$controller/reset_controller"
}

reset_function() {
    usleep $((count % 5 * 30000 + 30000))
    echo 1 >"$device/reset"
}

live lives "$DISK_LIVES" rebind
load=
if [ -n "$DISK_LOAD" ]; then
    /tmp/disk_load "$DISK" $DISK_LOAD &
    load=$!
fi
live resets "$DISK_RESETS" reset_controller
live flrs "$DISK_FLRS" reset_function
[ -z "$load" ] || wait "$load" || { echo "the load failed"; exit 1; }
