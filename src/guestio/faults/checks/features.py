"""Feature bits and protocol features: what may be offered, and what is done with what is chosen."""

from __future__ import annotations

from typing import Final

from guestio.faults.catalogue import hostile, register, user, virtio
from guestio.faults.kinds import bits
from guestio.faults.outcomes import HungUpError, SilentError
from guestio.faults.report import Severity
from guestio.faults.trial import (
    ACCESS_PLATFORM,
    IN_ORDER,
    LOG_ALL,
    PROTOCOL_BIT,
    RING_PACKED,
    VERSION_1,
    Trial,
)
from guestio.vhost_user.messages import U64, FrontendRequest, ProtocolFeature

_F = FrontendRequest
_RESERVED: Final = bits(24, 27)
"""Bits that only transitional devices may offer; VHOST_F_LOG_ALL and the vhost-user bit are
vhost's own."""
_UNDEFINED: Final = bits(25, 31, 42, *range(44, 50))
"""Bits for extensions of the specification that no version defines."""
_SR_IOV: Final = 1 << 37
_ADMIN_VQ: Final = 1 << 41
_TYPE_BITS: Final = (1 << 24) - 1 | ((1 << 64) - (1 << 50))
_UNUSABLE: Final = ACCESS_PLATFORM | RING_PACKED | LOG_ALL | _SR_IOV | _ADMIN_VQ | bits(38, 39, 40)
"""Bits that change what a driver must do, and are not tried one by one."""
_KNOWN_PROTOCOL: Final = sum(ProtocolFeature)

_NEEDS: Final[dict[str, tuple[tuple[str, int, int], ...]]] = {
    "blk": (("CONFIG_WCE", 1 << 11, 1 << 9),),
    "net": (
        ("GUEST_TSO4", 1 << 7, 1 << 1),
        ("GUEST_TSO6", 1 << 8, 1 << 1),
        ("GUEST_ECN", 1 << 9, bits(7, 8)),
        ("GUEST_UFO", 1 << 10, 1 << 1),
        ("GUEST_USO4", 1 << 54, 1 << 1),
        ("GUEST_USO6", 1 << 55, 1 << 1),
        ("HOST_TSO4", 1 << 11, 1 << 0),
        ("HOST_TSO6", 1 << 12, 1 << 0),
        ("HOST_ECN", 1 << 13, bits(11, 12)),
        ("HOST_UFO", 1 << 14, 1 << 0),
        ("HOST_USO", 1 << 56, 1 << 0),
        ("CTRL_RX", 1 << 18, 1 << 17),
        ("CTRL_VLAN", 1 << 19, 1 << 17),
        ("GUEST_ANNOUNCE", 1 << 21, 1 << 17),
        ("MQ", 1 << 22, 1 << 17),
        ("CTRL_MAC_ADDR", 1 << 23, 1 << 17),
        ("NOTF_COAL", 1 << 53, 1 << 17),
        ("RSS", 1 << 60, 1 << 17),
    ),
}
"""Features of a type, and of which others at least one must be offered with each."""


@register("features.version-1", virtio("6.2"), "VERSION_1 is offered.")
def _version_1(t: Trial) -> None:
    t.expect(bool(t.offered() & VERSION_1), "VIRTIO_F_VERSION_1 is not offered")


@register("features.constant", user("GET_FEATURES"), "The features offered stay the same.")
def _constant(t: Trial) -> None:
    first = t.offered()
    t.negotiate()
    second = t.offered()
    t.reconnect()
    third = t.offered()
    t.expect(
        first == second == third,
        f"offers {first:#x}, then {second:#x}, to the next front-end {third:#x}",
    )


@register(
    "features.reserved",
    virtio("2.2.2"),
    "No feature bit is offered that the specification does not define.",
)
def _reserved(t: Trial) -> None:
    bad = t.offered() & _UNDEFINED
    t.expect(not bad, f"offers undefined feature bits {bad:#x}")


@register(
    "features.legacy-bits",
    virtio("6.2"),
    "Bits of legacy devices are left to those that offer no VERSION_1, or are transitional.",
    severity=Severity.SHOULD,
)
def _legacy(t: Trial) -> None:
    bad = t.offered() & _RESERVED
    # ANY_LAYOUT and NOTIFY_ON_EMPTY: a transitional device may offer them.
    if bad and t.offered() & VERSION_1:
        t.reject(f"offers bits of a transitional device, {bad:#x}")
    t.expect(not bad, f"offers bits {bad:#x} of the legacy interface alone")


@register("features.sr-iov", virtio("6.2"), "SR_IOV is offered by PCI devices alone.")
def _sr_iov(t: Trial) -> None:
    t.expect(not t.offered() & _SR_IOV, "VIRTIO_F_SR_IOV is offered on vhost-user")


@register(
    "features.admin-queue",
    virtio("2.2.2"),
    "ADMIN_VQ, which is defined for PCI alone, is not offered.",
)
def _admin(t: Trial) -> None:
    t.expect(not t.offered() & _ADMIN_VQ, "VIRTIO_F_ADMIN_VQ is offered on vhost-user")


@register(
    "features.of-the-type",
    virtio("2.2.2"),
    "No feature bit is offered that is not defined for the type of the device.",
)
def _of_the_type(t: Trial) -> None:
    if t.kind.features is None:
        t.skip("the type of the device is not known")
    bad = t.offered() & _TYPE_BITS & ~t.kind.features
    t.expect(not bad, f"offers feature bits {bad:#x}, which a {t.kind.title} does not have")


@register(
    "features.requirements",
    virtio("2.2.2"),
    "No feature is offered without one that it requires.",
    devices=("blk", "net"),
)
def _requirements(t: Trial) -> None:
    offered = t.offered()
    for name, feature, needed in _NEEDS[t.kind.name]:
        if offered & feature:
            t.expect(bool(offered & needed), f"{name} is offered without what it requires")


@register(
    "features.least",
    virtio("2.2.2"),
    "A driver that accepts nothing but VERSION_1 is served.",
    severity=Severity.SHOULD,
)
def _least(t: Trial) -> None:
    t.serves(t.ready(0))


@register(
    "features.each",
    virtio("2.2.2"),
    "A driver that accepts a single feature besides VERSION_1 is served.",
    severity=Severity.SHOULD,
)
def _each(t: Trial) -> None:
    offered = t.offered() & ~(VERSION_1 | PROTOCOL_BIT | _UNUSABLE)
    required = {feature: needed for _, feature, needed in _NEEDS.get(t.kind.name, ())}
    for bit in range(64):
        feature = 1 << bit
        if not offered & feature or required.get(feature):
            continue
        t.reconnect()
        try:
            t.serves(t.ready(feature))
        except (HungUpError, SilentError) as outcome:
            t.fail(f"with feature bit {bit} alone: {outcome}")


@register(
    "features.subsets",
    virtio("2.2.2"),
    "A driver that accepts a random valid subset of the features is served.",
    severity=Severity.SHOULD,
)
def _subsets(t: Trial) -> None:
    offered = t.offered() & ~(VERSION_1 | PROTOCOL_BIT | _UNUSABLE)
    for _ in range(8):
        chosen = offered & t.random.getrandbits(64)
        for _, feature, needed in _NEEDS.get(t.kind.name, ()):
            if chosen & feature and not chosen & needed:
                chosen &= ~feature
        t.reconnect()
        try:
            t.serves(t.ready(chosen))
        except (HungUpError, SilentError) as outcome:
            t.fail(f"with features {chosen:#x}: {outcome}")


@register(
    "features.again",
    virtio("2.2.2"),
    "Features that were negotiated once can be negotiated again.",
    severity=Severity.SHOULD,
)
def _again(t: Trial) -> None:
    link = t.negotiate()
    link.do(_F.SET_FEATURES, U64(link.features))
    t.reconnect()
    t.serves(t.ready())


@register(
    "features.changed",
    virtio("2.2.2"),
    "Before a ring is started, other features can be negotiated, as firmware and kernels do.",
)
def _changed(t: Trial) -> None:
    link = t.negotiate(t.offered() & bits(28, 29) | IN_ORDER)
    least = link.u64(_F.GET_FEATURES) & (VERSION_1 | PROTOCOL_BIT)
    link.do(_F.SET_FEATURES, U64(least))
    link.features = least
    t.share()
    queue = t.new_queue()
    queue.start()
    t.serves(queue)


@hostile(
    "features.not-offered",
    virtio("2.2.1"),
    "A feature that was not offered is refused, or has no effect.",
)
def _not_offered(t: Trial) -> None:
    link = t.negotiate()
    extra = ~t.offered() & _UNDEFINED
    link.refuses(_F.SET_FEATURES, U64(link.features | extra))


@hostile(
    "features.all",
    virtio("2.2.1"),
    "Every feature bit at a time is refused, or has no effect.",
)
def _all(t: Trial) -> None:
    link = t.negotiate()
    link.refuses(_F.SET_FEATURES, U64((1 << 64) - 1))


@register(
    "protocol.get-before-features",
    user("GET_PROTOCOL_FEATURES"),
    "Protocol features can be read before SET_FEATURES.",
)
def _get_before(t: Trial) -> None:
    t.offered_protocol()


@register(
    "protocol.set-before-features",
    user("SET_PROTOCOL_FEATURES"),
    "Protocol features can be set before SET_FEATURES, and count from then on.",
)
def _set_before(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.REPLY_ACK)
    t.link.request(_F.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    reply = t.link.ask(_F.SET_OWNER, need_reply=True)
    t.expect(reply.u64 == 0, f"SET_OWNER was answered with {reply.u64}")


@register(
    "protocol.not-in-features",
    user("GET_PROTOCOL_FEATURES"),
    "Protocol features need no acceptance of the vhost-user bit by SET_FEATURES.",
)
def _not_in_features(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.REPLY_ACK)
    link = t.negotiate()
    link.do(_F.SET_FEATURES, U64(link.features & ~PROTOCOL_BIT))
    link.features &= ~PROTOCOL_BIT
    link.do(_F.SET_OWNER)


@register(
    "protocol.known",
    user("Protocol features"),
    "No protocol feature is offered that is not defined.",
    severity=Severity.SHOULD,
)
def _known(t: Trial) -> None:
    bad = t.offered_protocol() & ~_KNOWN_PROTOCOL
    t.expect(not bad, f"offers unknown protocol features {bad:#x}")


@register(
    "protocol.constant",
    user("GET_PROTOCOL_FEATURES"),
    "The protocol features offered stay the same.",
)
def _protocol_constant(t: Trial) -> None:
    first = t.offered_protocol()
    t.negotiate()
    second = t.link.u64(_F.GET_PROTOCOL_FEATURES)
    t.expect(first == second, f"offers {first:#x}, then {second:#x}")


@register(
    "protocol.mq",
    user("Multiple queue support"),
    "MQ is offered, also by a device with a fixed number of queues.",
    severity=Severity.SHOULD,
)
def _mq(t: Trial) -> None:
    t.expect(bool(t.offered_protocol() & ProtocolFeature.MQ), "MQ is not offered")


@register(
    "protocol.queue-count",
    user("GET_QUEUE_NUM"),
    "The number of queues is at least what the type of the device has.",
)
def _queue_count(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.MQ)
    t.negotiate()
    count = t.link.u64(_F.GET_QUEUE_NUM)
    t.expect(
        t.kind.queues <= count <= 65536, f"says it has {count} queues, not {t.kind.queues} or more"
    )


@register(
    "protocol.inband-alone",
    user("In-band notifications"),
    "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK ends the connection.",
    severity=Severity.SHOULD,
)
def _inband(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.INBAND_NOTIFICATIONS)
    t.link.request(_F.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.INBAND_NOTIFICATIONS))
    t.expect(t.link.closed(t.patience), "goes on with INBAND_NOTIFICATIONS alone")


@register(
    "protocol.cross-endian",
    user("SET_VRING_ENDIAN"),
    "CROSS_ENDIAN, which is for legacy devices, is offered by devices without VERSION_1 alone.",
    severity=Severity.SHOULD,
)
def _cross_endian(t: Trial) -> None:
    offered = t.offered_protocol()
    if not offered & ProtocolFeature.CROSS_ENDIAN:
        return
    if t.offered() & VERSION_1:
        t.reject("offers CROSS_ENDIAN with VERSION_1")


@hostile(
    "protocol.not-offered",
    user("SET_PROTOCOL_FEATURES"),
    "Protocol features that were not offered are refused, or have no effect.",
)
def _protocol_not_offered(t: Trial) -> None:
    t.offered_protocol()
    t.negotiate()
    t.link.refuses(_F.SET_PROTOCOL_FEATURES, U64((1 << 64) - 1))


@hostile(
    "protocol.unused-message",
    user("Protocol features"),
    "Messages of protocol features that were not negotiated are refused or ignored.",
)
def _unused(t: Trial) -> None:
    link = t.negotiate(protocol=ProtocolFeature.REPLY_ACK)
    for code in (_F.SEND_RARP, _F.SET_VRING_ENDIAN, _F.VRING_KICK, _F.NET_SET_MTU):
        link.refuses(code, bytes(8))


@register("owner.set", user("SET_OWNER"), "SET_OWNER begins a session, and may be repeated.")
def _owner(t: Trial) -> None:
    t.negotiate()
    t.link.do(_F.SET_OWNER)


@register(
    "owner.reset",
    user("RESET_OWNER"),
    "RESET_OWNER is ignored, or disables rings; the connection keeps its state.",
    severity=Severity.SHOULD,
)
def _owner_reset(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    try:
        value = t.link.result(_F.RESET_OWNER)
    except HungUpError:
        t.fail("closed the connection at RESET_OWNER")
    if value:
        t.reject(f"RESET_OWNER was refused ({value})")
    if t.link.features & PROTOCOL_BIT:
        queue.enable()
    queue.kick()
    t.serves(queue)
