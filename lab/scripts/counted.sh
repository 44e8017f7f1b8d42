# Direct requests of a disk, of which the kernel counts every one; then an address that is not mapped.
#   DISK             block device (/dev/vda)
#   COUNTED_EACH     requests of each of two processes (400)
#   COUNTED_NOWHERE  1 to have the device's queue put where nothing is mapped at the end (0)
# Tells what the kernel counts: counted_reads, _writes, _discards and _flushes, of the driver's life.
: "${DISK:=/dev/vda}" "${COUNTED_EACH:=400}" "${COUNTED_NOWHERE:=0}"
set -eu
cp /lab/files/disk_load /lab/files/nowhere /tmp
chmod +x /tmp/disk_load /tmp/nowhere
/tmp/disk_load "$DISK" 2 "$COUNTED_EACH" 128
# A file system's writes, merged and flushed as the kernel likes.
dd if=/dev/urandom of="$DISK" bs=64k seek=64 count=16 conv=fsync status=none
# What is counted is counted once it is done; nothing is under way after this.
sync
blockdev --flushbufs "$DISK"
device=$(readlink -f "/sys/block/${DISK##*/}/device/..")
read -r reads _ _ _ writes _ _ _ _ _ _ discards _ _ _ flushes _ <"/sys/block/${DISK##*/}/stat"
echo "FACT counted_reads=$reads"
echo "FACT counted_writes=$writes"
echo "FACT counted_discards=$discards"
echo "FACT counted_flushes=$flushes"
if [ "$COUNTED_NOWHERE" = 1 ]; then
    echo "${device##*/}" >/sys/bus/pci/drivers/virtio-pci/unbind
    /tmp/nowhere "$device"
fi
