# Reads a whole disk and reports its size and SHA-256.
#   DISK  block device (/dev/vda)
: "${DISK:=/dev/vda}"
set -eu
echo "FACT size=$(blockdev --getsize64 "$DISK")"
echo "FACT sha256=$(dd if="$DISK" bs=1M iflag=direct status=none | sha256sum | cut -d' ' -f1)"
