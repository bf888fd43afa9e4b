# Builds the lab's namespaces. $P is their prefix; see lab.rs for the picture.
for n in c r ra rb ga gb plug vm n; do
  ip netns add $P$n
  ip -n $P$n link set lo up
  x $n sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0
done
link() { ip link add $2 netns $P$1 type veth peer name $4 netns $P$3; ip -n $P$1 link set $2 up; ip -n $P$3 link set $4 up; }
addr() { ip -n $P$1 addr add $2 dev $4; ip -n $P$1 addr add $3 dev $4 nodad; }
router() { x $1 sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1; }
default() { ip -n $P$1 route add default via $2; ip -n $P$1 -6 route add default via $3; }

for n in r ra rb; do router $n; done
link c c0 r rc
addr c 192.0.2.10/24 2001:db8:c::10/64 c0
addr r 192.0.2.1/24 2001:db8:c::1/64 rc
default c 192.0.2.1 2001:db8:c::1
link r toa ra wan; addr r 198.18.1.1/30 2001:db8:1::1/64 toa; addr ra 198.18.1.2/30 2001:db8:1::2/64 wan
link r tob rb wan; addr r 198.18.2.1/30 2001:db8:2::1/64 tob; addr rb 198.18.2.2/30 2001:db8:2::2/64 wan
default ra 198.18.1.1 2001:db8:1::1
default rb 198.18.2.1 2001:db8:2::1
ip -n ${P}r route add 198.51.100.0/24 via 198.18.1.2
ip -n ${P}r route add 203.0.113.0/24 via 198.18.2.2
ip -n ${P}r -6 route add 2001:db8:a::/64 via 2001:db8:1::2
ip -n ${P}r -6 route add 2001:db8:b::/64 via 2001:db8:2::2

# Hosts: the LAN's uplink in a bridge, the address on the bridge.
# Its own: one that a bridge takes from its ports changes with them.
for s in a b; do
  ip -n ${P}g$s link add br0 address 02:00:00:00:02:0$s type bridge forward_delay 0
  ip -n ${P}g$s link set br0 up
  link r$s lan g$s up0
  ip -n ${P}g$s link set up0 master br0
  x g$s sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1
done
addr ra 198.51.100.1/24 2001:db8:a::1/64 lan; addr ga 198.51.100.2/24 2001:db8:a::2/64 br0; default ga 198.51.100.1 2001:db8:a::1
addr rb 203.0.113.1/24 2001:db8:b::1/64 lan; addr gb 203.0.113.2/24 2001:db8:b::2/64 br0; default gb 203.0.113.1 2001:db8:b::1

# A neighbour of the guest on its home LAN.
link ga tapn n n0
ip -n ${P}ga link set tapn master br0
addr n 198.51.100.20/24 2001:db8:a::20/64 n0
default n 198.51.100.1 2001:db8:a::1

# The guest, plugged in at home. Its caches survive what a real machine's do.
ip -n ${P}plug link add sw address 02:00:00:00:02:0c type bridge forward_delay 0
ip -n ${P}plug link set sw up
link plug pv vm v0
ip -n ${P}plug link set pv master sw
ip -n ${P}vm link set v0 address 52:54:00:aa:00:10
addr vm 198.51.100.10/24 2001:db8:a::10/64 v0
default vm 198.51.100.1 2001:db8:a::1
link plug pa ga tapa
link plug pb gb tapb
ip -n ${P}ga link set tapa master br0
ip -n ${P}plug link set pa master sw

# The core drops what a site must not send; site a's router tracks connections and takes no strangers.
x r nft -f - <<'N'
table inet bcp38 {
  chain c_forward {
    type filter hook forward priority 0; policy accept;
    iifname "toa" ip saddr != { 198.51.100.0/24, 198.18.1.0/30 } counter drop
    iifname "tob" ip saddr != { 203.0.113.0/24, 198.18.2.0/30 } counter drop
    iifname "toa" meta nfproto ipv6 ip6 saddr != { 2001:db8:a::/64, 2001:db8:1::/64 } counter drop
    iifname "tob" meta nfproto ipv6 ip6 saddr != { 2001:db8:b::/64, 2001:db8:2::/64 } counter drop
  }
}
N
x ra nft -f - <<'N'
table inet firewall {
  chain c_forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    ct state invalid counter drop
    iifname "lan" ct state new accept
    tcp flags & (fin | syn | rst | ack) == syn ct state new accept
    meta l4proto { udp, icmp, ipv6-icmp } ct state new accept
  }
}
N
x ra sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0
