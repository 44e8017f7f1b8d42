# Uses what of an entropy device, a keyboard and a console is named in DEVICES; says what it saw.
#   DEVICES  words: rng keyboard console port
#   SIZE, NEW_SIZE  rows and columns that the console has, and gets while it is used
#   RELOADS  how often the drivers of the first two are taken away and brought back (0)
# modules: virtio-rng virtio_input evdev virtio_console
: "${RELOADS:=0}"
set -eu

wait_for() { # command...
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "never: $*"; exit 1; }
        usleep 20000
    done
}

again() { # module device: reloads a driver and uses its device, RELOADS times
    count=0
    "$2"
    while [ "$count" -lt "$RELOADS" ]; do
        rmmod "$1"
        insmod "/lab/modules/$1.ko"
        "$2"
        count=$((count + 1))
        echo "FACT $2_reloads=$count"
    done
}

rng() { again virtio_rng read_rng; }

read_rng() {
    wait_for grep -q virtio /sys/class/misc/hw_random/rng_current
    echo "FACT rng=$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null)"
}

keyboard() { again virtio_input read_key; }

read_key() {
    wait_for grep -q guestio /sys/class/input/event*/device/name
    name=$(grep -l guestio /sys/class/input/event*/device/name)
    event=${name%/device/name}
    echo "FACT keyboard=$(cat "$name")"
    # struct input_event: time (16 bytes), type, code, value
    dd if="/dev/input/${event##*/}" bs=24 count=1 2>/dev/null >/tmp/event
    echo "FACT key=$(od -An -tu2 -j16 -N4 /tmp/event | tr -s ' ')"
}

size_is() { [ "$(stty -F /dev/hvc0 size)" = "$1" ]; }

console() {
    wait_for test -c /dev/hvc0
    stty -F /dev/hvc0 raw -echo
    exec 3<>/dev/hvc0
    echo "hello from the guest" >&3
    wait_for size_is "$SIZE"
    echo "FACT size=$(stty -F /dev/hvc0 size)"
    read -r line <&3
    echo "FACT typed=$line"
    wait_for size_is "$NEW_SIZE"
    echo "FACT new_size=$(stty -F /dev/hvc0 size)"
}

port() {
    wait_for test -c /dev/vport0p1
    echo "FACT port=$(cat /sys/class/virtio-ports/vport0p1/name)"
    exec 4<>/dev/vport0p1
    echo "a line from the port" >&4
    read -r line <&4
    echo "FACT answer=$line"
}

for device in $DEVICES; do
    "$device"
done
echo "FACT done=yes"
sleep 1000
