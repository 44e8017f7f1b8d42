# Uses the card eth0: DHCP, pings of two sizes, a transfer each way, and its driver is reloaded in
# between. At the end the sums of what was transferred are told.
#   ROUTER   address that answers (10.0.2.1)
#   ADDRESS  with its prefix, if there is no DHCP
#   PINGS    of each size (100)
#   RELOADS  how often the driver is taken away and brought back (3)
#   STAY     if not empty, pings go on for ever afterwards
#   BYTES    to send to port 7001 and to receive from port 7002 of ROUTER (0)
# modules: virtio_net
: "${ROUTER:=10.0.2.1}" "${ADDRESS:=}" "${PINGS:=100}" "${RELOADS:=3}" "${BYTES:=0}" "${STAY:=}"
set -eu
cat >/tmp/dhcp <<'SCRIPT'
#!/bin/busybox sh
case $1 in
    deconfig) ip addr flush dev "$interface" ;;
    bound) ip addr add "$ip/$mask" dev "$interface" && echo "FACT dhcp=$ip/$mask $router" ;;
esac
SCRIPT
chmod +x /tmp/dhcp

configure() {
    tries=0
    until [ -e /sys/class/net/eth0 ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 500 ] || { echo "no card"; exit 1; }
        usleep 20000
    done
    ip link set eth0 up
    if [ -n "$ADDRESS" ]; then
        ip addr add "$ADDRESS" dev eth0
    else
        udhcpc -i eth0 -n -q -f -s /tmp/dhcp -t 10 -T 1 >/tmp/udhcpc 2>&1 || { cat /tmp/udhcpc; exit 1; }
        grep FACT /tmp/udhcpc
    fi
}

pings() { # size
    ping -A -c "$PINGS" -s "$1" -W 10 "$ROUTER" >/tmp/pings || true
    count=$(sed -n 's/.* \([0-9]*\) packets received.*/\1/p' /tmp/pings)
    echo "FACT pings_$1=$count"
    [ "$count" = "$PINGS" ] || { tail -5 /tmp/pings; exit 1; }
}

ip link set lo up
configure
echo "FACT mac=$(cat /sys/class/net/eth0/address)"
echo "FACT mtu=$(cat /sys/class/net/eth0/mtu)"
echo "FACT queues=$(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
pings 56
pings 1400
life=0
while [ "$life" -lt "$RELOADS" ]; do
    ping -A -c 1000000 -s 1000 -W 1 "$ROUTER" >/dev/null 2>&1 &
    flood=$!
    usleep 50000
    rmmod virtio_net
    kill "$flood" 2>/dev/null || true
    insmod /lab/modules/virtio_net.ko
    configure
    ping -c 1 -W 10 "$ROUTER" >/dev/null
    life=$((life + 1))
done
echo "FACT reloads=$life"
if [ "$BYTES" -gt 0 ]; then
    dd if=/dev/urandom of=/tmp/out bs=65536 count=$((BYTES / 65536)) status=none
    echo "FACT sent=$(sha256sum </tmp/out | cut -d' ' -f1)"
    nc "$ROUTER" 7001 </tmp/out
    rm /tmp/out
    nc "$ROUTER" 7002 </dev/null | sha256sum | sed 's/^\([0-9a-f]*\).*/FACT received=\1/'
fi
pings 56
if [ -n "$STAY" ]; then
    ping -A -s 1000 "$ROUTER" >/tmp/pings &
    until grep -q seq=1 /tmp/pings; do
        usleep 20000
    done
    echo "FACT stays=yes"
    wait
fi
