# Suspends to memory and wakes up by the clock, where the kernel can, and reads what it wrote before.
#   DISK           block device (/dev/nvme0n1)
: "${DISK:=/dev/nvme0n1}"
set -eu
if ! grep -q mem /sys/power/state 2>/dev/null; then
    echo "FACT nvme_suspend=the kernel cannot"
    exit 0
fi
dd if=/dev/urandom of=/tmp/before bs=4096 count=64 status=none
dd if=/tmp/before of="$DISK" bs=4096 oflag=direct conv=notrunc status=none
if [ -e /sys/power/pm_test ]; then
    # Everything but the sleep itself: devices go down and come back.
    echo devices >/sys/power/pm_test
    echo mem >/sys/power/state
    echo "FACT nvme_suspend=devices"
elif [ -e /dev/rtc0 ]; then
    rtcwake -m mem -s 3
    echo "FACT nvme_suspend=mem"
else
    echo "FACT nvme_suspend=there is no clock to wake it up"
    exit 0
fi
dd if="$DISK" bs=4096 count=64 iflag=direct status=none | cmp - /tmp/before
