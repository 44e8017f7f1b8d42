# Waits for a virtio disk that is a PCI function, and has it live through what its driver can do.
#   DISK           block device (/dev/vda)
#   DISK_LIVES     unbind and bind the PCI function, so often (0)
#   DISK_FLRS      function level resets, each between two drivers (0): Linux's driver for virtio
#                  before 6.14 does not know that one happened
#   DISK_LOAD      arguments of /lab/files/disk_load at the end; without it there is none
# modules: virtio_pci virtio_blk
: "${DISK:=/dev/vda}" "${DISK_LIVES:=0}" "${DISK_FLRS:=0}" "${DISK_LOAD:=}"
set -eu
name=${DISK##*/}

disk_is_there() {
    tries=0
    until [ -b "$DISK" ] && [ -r "/sys/block/$name/size" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "no disk in $1"; exit 1; }
        usleep 10000
    done
}

disk_is_there "the first life"
device=$(readlink -f "/sys/block/$name/device/..")
function=${device##*/}
driver=$(readlink -f "$device/driver")
echo "FACT disk_driver=${driver##*/}"
echo "FACT disk_iommu=$(cat "$device/iommu_group/type" 2>/dev/null || echo none)"
echo "FACT disk_interrupts=$(ls "$device/msi_irqs" 2>/dev/null | wc -l)"

rebind() { # what is done between the drivers
    echo "$function" >"$driver/unbind"
    "$@"
    echo "$function" >"$driver/bind"
    disk_is_there "life $count"
    dd if="$DISK" of=/dev/null bs=4096 count=4 iflag=direct status=none
}

reset_function() {
    grep -qw flr "$device/reset_method"
    echo flr >"$device/reset_method"
    echo 1 >"$device/reset"
}

for count in $(seq "$DISK_LIVES"); do
    rebind true
done
echo "FACT disk_lives=$DISK_LIVES"
for count in $(seq "$DISK_FLRS"); do
    rebind reset_function
done
echo "FACT disk_flrs=$DISK_FLRS"
[ -z "$DISK_LOAD" ] || {
    cp /lab/files/disk_load /tmp/load && chmod +x /tmp/load
    /tmp/load "$DISK" $DISK_LOAD
}
