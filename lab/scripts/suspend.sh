# Suspends the guest, has its clock wake it up, and reads from the disk what was written before.
# "mem" is suspend to RAM: the machine is reset when it wakes up, its firmware runs, and drivers
# bring their devices back. (From "freeze" no clock wakes a guest under TCG.)
#   DISK      block device
#   SUSPENDS  ways, in turn ("mem")
: "${SUSPENDS:=mem}"
set -eu
alarm=/sys/class/rtc/rtc0/wakealarm
resumed=

for way in $SUSPENDS; do
    if ! grep -qw "$way" /sys/power/state || [ ! -e "$alarm" ]; then
        echo "FACT suspend_$way=cannot"
        continue
    fi
    dd if=/dev/urandom of=/tmp/before bs=4096 count=64 status=none
    dd if=/tmp/before of="$DISK" bs=4096 oflag=direct conv=notrunc status=none
    # Long enough to be asleep by then, also on a busy machine: afterwards nothing wakes it.
    echo 0 >"$alarm"
    echo +30 >"$alarm"
    echo "$way" >/sys/power/state
    dd if="$DISK" bs=4096 count=64 iflag=direct status=none | cmp - /tmp/before
    dd if=/tmp/before of="$DISK" bs=4096 seek=64 oflag=direct conv=notrunc status=none
    echo "FACT suspend_$way=resumed"
    resumed="$resumed $way"
done
echo "FACT suspends=${resumed:-none}"
