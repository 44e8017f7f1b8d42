# Has all devices suspended and resumed, where the kernel can without going to sleep itself, and
# reads what was written before.
#   DISK           block device (/dev/nvme0n1)
: "${DISK:=/dev/nvme0n1}"
set -eu
if [ ! -e /sys/power/pm_test ] || ! grep -q mem /sys/power/state; then
    echo "FACT nvme_suspend=cannot"
    exit 0
fi
dd if=/dev/urandom of=/tmp/before bs=4096 count=64 status=none
dd if=/tmp/before of="$DISK" bs=4096 oflag=direct conv=notrunc status=none
echo devices >/sys/power/pm_test
echo mem >/sys/power/state
dd if="$DISK" bs=4096 count=64 iflag=direct status=none | cmp - /tmp/before
echo "FACT nvme_suspend=devices"
