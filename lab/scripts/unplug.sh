# Uses a disk that is unplugged and plugged in again, UNPLUGS times, amid requests.
# modules: virtio_pci virtio_blk
#   DISK     block device
#   UNPLUGS  how often (1)
# The host unplugs it after `FACT plugged=N`, and plugs it in after `FACT gone=N`.
: "${UNPLUGS:=1}"
set -eu

wait_for() { # command...
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 6000 ] || { echo "never: $*"; exit 1; }
        usleep 20000
    done
}

is_there() { [ -b "$DISK" ] && dd if="$DISK" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null; }
is_gone() { [ ! -e "$DISK" ]; }

for life in $(seq "$UNPLUGS"); do
    wait_for is_there
    echo "FACT sum_$life=$(dd if="$DISK" bs=64k iflag=direct status=none | sha256sum | cut -d' ' -f1)"
    echo "FACT plugged=$life"
    while is_there; do :; done
    wait_for is_gone
    echo "FACT gone=$life"
done
wait_for is_there
echo "FACT sum_last=$(dd if="$DISK" bs=64k iflag=direct status=none | sha256sum | cut -d' ' -f1)"
