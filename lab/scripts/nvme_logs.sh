# Has nvme-cli read what an NVMe controller says of itself, and refuse what it should.
# programs: nvme
#   DISK           block device (/dev/nvme0n1)
: "${DISK:=/dev/nvme0n1}"
set -eu
name=${DISK##*/}
controller=/dev/${name%n[0-9]*}
nvme=/lab/bin/nvme

for what in "id-ctrl $controller" "id-ns $DISK" "list-ns $controller" "ns-descs $DISK" \
    "smart-log $controller" "error-log $controller" "fw-log $controller" \
    "changed-ns-list-log $controller" "effects-log $controller" \
    "get-feature $controller -f 1" "get-feature $controller -f 2" "get-feature $controller -f 4" \
    "get-feature $controller -f 6" "get-feature $controller -f 7" "get-feature $controller -f 11" \
    "flush $DISK -n 1"; do
    $nvme $what >/tmp/out 2>&1 || { echo "nvme $what:"; cat /tmp/out; exit 1; }
done
if $nvme format "$DISK" --force >/tmp/out 2>&1; then
    echo "nvme format was not refused"
    exit 1
fi
$nvme smart-log "$controller" | sed -n 's/^\([a-z_]*\)[ \t]*: *\([0-9]*\).*/FACT smart_\1=\2/p'
$nvme error-log "$controller" >/tmp/out
echo "FACT nvme_logs=1"
