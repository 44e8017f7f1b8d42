# Uses each device that is named in DEVICES, reloads its driver RELOADS times and uses the device
# again each time. At the end all of them are in use without pause: `FACT busy_DEVICE=N` counts.
#   DEVICES  words: disk rng keyboard console port; net (configured before, see net.sh)
#   RELOADS  how often the driver of a disk, rng, keyboard or console is taken away and
#            brought back (0)
#   ROUTER   address that answers pings (10.0.2.1)
# In life L of the console's driver the console has 40 + L rows and 100 + L columns, and then one
# more of each.
# modules: virtio_net virtio_blk virtio-rng virtio_input evdev virtio_console
: "${RELOADS:=0}" "${ROUTER:=10.0.2.1}"
set -eu

wait_for() { # command...
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "never: $*"; exit 1; }
        usleep 20000
    done
}

reload() { # driver
    if [ -e "/lab/modules/$1.ko" ]; then
        rmmod "$1"
        insmod "/lab/modules/$1.ko"
        return
    fi
    # It is built into the kernel.
    bound=$(ls -d "/sys/bus/virtio/drivers/$1"/virtio*)
    echo "${bound##*/}" >"/sys/bus/virtio/drivers/$1/unbind"
    echo "${bound##*/}" >"/sys/bus/virtio/drivers/$1/bind"
}

reloading() { # driver device
    life=0
    "use_$2"
    while [ "$life" -lt "$RELOADS" ]; do
        reload "$1"
        life=$((life + 1))
        "use_$2"
        echo "FACT $2_reloads=$life"
    done
}

use_disk() {
    wait_for test -b /dev/vda
    dd if=/dev/urandom of=/tmp/written bs=64k count=4 status=none
    dd if=/tmp/written of=/dev/vda bs=64k seek=16 oflag=direct conv=notrunc status=none
    echo "FACT disk_written=$(sha256sum </tmp/written | cut -d' ' -f1)"
    sum=$(dd if=/dev/vda bs=64k count=16 iflag=direct status=none | sha256sum)
    echo "FACT disk_read=${sum%% *}"
}

use_rng() {
    wait_for grep -q virtio /sys/class/misc/hw_random/rng_current
    echo "FACT rng=$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null)"
}

use_keyboard() {
    wait_for grep -q guestio /sys/class/input/event*/device/name
    name=$(grep -l guestio /sys/class/input/event*/device/name)
    event=${name%/device/name}
    event=/dev/input/${event##*/}
    wait_for test -c "$event"
    echo "FACT keyboard=$(cat "$name")"
    # struct input_event: time (16 bytes), type, code, value
    cat "$event" | head -c 24 >/tmp/event
    echo "FACT key=$event$(od -An -tu2 -j16 -N4 /tmp/event | tr -s ' ')"
}

raw() { stty -F /dev/hvc0 raw -echo 2>/dev/null; }

size_is() { [ "$(stty -F /dev/hvc0 size)" = "$1" ]; }

use_console() {
    wait_for raw # The node is there before the terminal is.
    exec 3<>/dev/hvc0
    echo "hello from life $life." >&3
    echo "FACT console=$life"
    wait_for size_is "$((40 + life)) $((100 + life))"
    read -r line <&3
    echo "FACT typed_$life=$line"
    wait_for size_is "$((41 + life)) $((101 + life))"
    echo "FACT size_$life=$(stty -F /dev/hvc0 size)"
    exec 3>&-
}

use_port() {
    wait_for test -c /dev/vport0p1
    echo "FACT port=$(cat /sys/class/virtio-ports/vport0p1/name)"
    exec 4<>/dev/vport0p1
    echo "a line from the port" >&4
    read -r line <&4
    echo "FACT answer=$line"
}

once_disk() { dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct; }
once_net() { ping -A -c 20 -s 1000 -W 10 "$ROUTER"; }
once_rng() { dd if=/dev/hwrng of=/dev/null bs=64 count=1; }
once_keyboard() { cat "$event" | head -c 24; }
once_console() { echo "still here" >/dev/hvc0; }
once_port() { echo "still here" >&4; }

busy() { # device
    times=0
    while "once_$1" >/dev/null 2>&1; do
        times=$((times + 1))
        echo "FACT busy_$1=$times"
    done
    # Never while its server serves it.
    echo "FACT broken=$1"
}

for device in $DEVICES; do
    case $device in
        disk) reloading virtio_blk disk ;;
        rng) reloading virtio_rng rng ;;
        keyboard) reloading virtio_input keyboard ;;
        console) reloading virtio_console console ;;
        port) use_port ;;
    esac
done
echo "FACT done=yes"
for device in $DEVICES; do
    busy "$device" &
done
sleep 10000
