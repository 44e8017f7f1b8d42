# Uses each device that is named in DEVICES, all at the same time, while it misbehaves, and tells
# what came of it: `FACT DEVICE=ok`, or what was wrong. A device whose driver or user does not come
# back tells nothing. Drivers are inserted here, as the insertion of one may hang.
#   DEVICES  words: disk net rng keyboard console nvme
#   LATE     modules to insert, each in the background of the one before
#   LIMIT    seconds until the end
#   ROUTER   address that answers pings (10.0.2.1)
set -u

wait_for() { # command...
    tries=0
    until "$@" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 400 ] || return 1
        usleep 50000
    done
}

tell() { echo "FACT $1=$2"; }

use_blocks() { # device node
    wait_for test -b "$2" || { tell "$1" "no disk"; return; }
    dd if=/dev/urandom of="/tmp/written-$1" bs=16k count=8 status=none
    for round in 1 2 3; do
        dd if="/tmp/written-$1" of="$2" bs=16k seek=16 oflag=direct conv=notrunc status=none ||
            { tell "$1" "error of a write"; return; }
        dd if="$2" of="/tmp/read-$1" bs=16k skip=16 count=8 iflag=direct status=none ||
            { tell "$1" "error of a read"; return; }
        cmp -s "/tmp/written-$1" "/tmp/read-$1" || { tell "$1" "other data"; return; }
    done
    tell "$1" ok
}

use_disk() { use_blocks disk /dev/vda; }
use_nvme() { use_blocks nvme /dev/nvme0n1; }

use_net() {
    wait_for test -e /sys/class/net/eth0 || { tell net "no card"; return; }
    ip link set eth0 up
    ip addr add 10.0.2.2/24 dev eth0
    ping -A -c 30 -s 1000 -W 2 -w 15 "$ROUTER" >/tmp/pings 2>&1
    count=$(sed -n 's/.* \([0-9]*\) packets received.*/\1/p' /tmp/pings)
    sent=$(sed -n 's/^\([0-9]*\) packets transmitted.*/\1/p' /tmp/pings)
    [ "$count" = 30 ] && tell net ok || tell net "$count of ${sent:-0} pings answered"
}

use_rng() {
    wait_for grep -q virtio /sys/class/misc/hw_random/rng_current || { tell rng "no source"; return; }
    dd if=/dev/hwrng of=/tmp/random bs=64 count=16 iflag=fullblock status=none
    size=$(wc -c </tmp/random)
    [ "$size" = 1024 ] && tell rng ok || tell rng "$size of 1024 bytes"
}

has_keyboard() { grep -q guestio /sys/class/input/event*/device/name; }

use_keyboard() {
    wait_for has_keyboard || { tell keyboard "no keyboard"; return; }
    name=$(grep -l guestio /sys/class/input/event*/device/name)
    event=${name%/device/name}
    event=/dev/input/${event##*/}
    wait_for test -c "$event"
    cat "$event" | head -c 480 | od -An -v -tu2 -w24 | awk '$9 == 1 && $10 == 30 { n++ }
        $9 == 1 && $10 != 30 { odd++ } END { exit !(n > 5 && !odd) }' &&
        tell keyboard ok || tell keyboard "other keys"
}

use_console() {
    wait_for stty -F /dev/hvc0 raw -echo || { tell console "no console"; return; }
    line=0
    while [ "$line" -lt 40 ]; do
        line=$((line + 1))
        echo "line $line of the guest" >/dev/hvc0
    done
    tell console ok
}

for module in $LATE; do
    insmod "/lab/late/$module.ko" || echo "cannot insert $module" &
    # Most drivers are there at once; one that hangs must not keep the others out.
    usleep 500000
done
for device in $DEVICES; do
    "use_$device" &
done
beat=0
while [ "$beat" -lt "$LIMIT" ]; do
    sleep 1
    beat=$((beat + 1))
    echo "FACT beat=$beat"
done
