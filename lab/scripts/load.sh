# Makes random requests of a disk, and verifies what it reads.
#   DISK       block device (/dev/vda)
#   DISK_LOAD  arguments of /lab/files/disk_load behind the device
: "${DISK:=/dev/vda}"
set -eu
cp /lab/files/disk_load /tmp/load
chmod +x /tmp/load
/tmp/load "$DISK" $DISK_LOAD
