# Suspends and wakes up by the clock, where the kernel can, and reads what it wrote before.
#   DISK           block device (/dev/nvme0n1)
: "${DISK:=/dev/nvme0n1}"
set -eu
alarm=/sys/class/rtc/rtc0/wakealarm
if ! grep -q mem /sys/power/state 2>/dev/null || [ ! -e "$alarm" ]; then
    echo "FACT nvme_suspend=cannot"
    exit 0
fi
# Devices go down and come back; the machine itself only idles, as firmware is not what is tested.
[ ! -e /sys/power/mem_sleep ] || echo s2idle >/sys/power/mem_sleep
dd if=/dev/urandom of=/tmp/before bs=4096 count=64 status=none
dd if=/tmp/before of="$DISK" bs=4096 oflag=direct conv=notrunc status=none
echo +3 >"$alarm"
echo mem >/sys/power/state
dd if="$DISK" bs=4096 count=64 iflag=direct status=none | cmp - /tmp/before
echo "FACT nvme_suspend=woke"
