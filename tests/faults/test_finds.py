"""Each defect of a back-end is found, by the check that is for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guestio.faults import Verdict, catalogue, check
from tests.kit.broken_backend import FEATURES, BrokenBackend

PATIENCE = 20.0
"""Seconds for an honest answer, on a machine with much to do."""

DEFECTS = [
    # Messages
    ("message.reply-header", "no-reply-flag"),
    ("message.reply-header", "reply-version"),
    ("message.reply-header", "wrong-code"),
    ("message.features-size", "short-features"),
    ("message.reply-once", "answers-twice"),
    ("message.in-pieces", "whole-messages"),
    ("message.payload-later", "whole-messages"),
    ("message.together", "drops-the-rest"),
    ("message.unknown-with-reply", "unknown-succeeds"),
    *((f"ack.{name}", f"nack-{code}") for name, code in (
        ("SET_OWNER", 3), ("SET_FEATURES", 2), ("SET_MEM_TABLE", 5), ("SET_VRING_NUM", 8),
        ("SET_VRING_BASE", 10), ("SET_VRING_ADDR", 9), ("SET_VRING_ERR", 14),
        ("SET_VRING_CALL", 13), ("SET_VRING_KICK", 12), ("SET_VRING_ENABLE", 18),
    )),
    ("ack.only-if-asked", "ack-unasked"),
    ("ack.own-reply", "ack-besides"),
    ("ack.not-negotiated", "ack-always"),
    ("ack.failure", "always-succeeds"),
    ("malformed.huge-payload", "waits-for-payload"),
    ("descriptor.unexpected", "keeps-surplus"),
    ("memory-table.too-few-descriptors", "descriptors-uncounted"),
    ("connection.memory-left-alone", "serves-the-dead"),
    ("connection.descriptors-closed", "keeps-descriptors"),
    # Features
    ("features.constant", "features-change"),
    ("features.least", "wants-all-features"),
    ("features.changed", "features-once"),
    ("protocol.get-before-features", "protocol-after-features"),
    ("protocol.known", "unknown-protocol"),
    ("protocol.mq", "no-mq"),
    ("protocol.queue-count", "no-queues"),
    ("protocol.inband-alone", "inband-alone"),
    ("owner.reset", "reset-owner-hangs-up"),
    # Rings begin and end
    ("ring.enable-later", "enable-forgets one-a-kick"),
    ("ring.enabled-without-protocol", "never-enabled-alone"),
    ("ring.not-before-kick", "serves-unkicked"),
    ("ring.stop-answers", "stops-wide"),
    ("ring.stop-answers", "stops-another"),
    ("ring.stop-answers", "never-stops"),
    ("ring.stop-index", "stops-at-zero"),
    ("ring.stop-index", "stops-one-early"),
    ("ring.stop-index-from-base", "base-ignored"),
    ("ring.stopped-not-processed", "runs-on-when-stopped keeps-the-kick"),
    ("ring.stop-settles", "stops-one-early"),
    ("ring.restart", "stops-one-early"),
    ("ring.suspended-memory", "writes-when-stopped"),
    ("ring.suspended-no-calls", "calls-when-stopped"),
    ("ring.kick-changed", "kick-once"),
    ("ring.call-changed", "call-once"),
    ("ring.no-call", "wants-a-call"),
    ("ring.no-error-descriptor", "wants-an-error"),
    ("ring.base-wraps", "slot-not-wrapped"),
    ("ring.storm-of-calls", "blocks-at-call"),
    ("reset.device-disables", "reset-does-nothing"),
    ("status.initial", "status-begins"),
    ("status.kept", "status-lost"),
    ("status.features-ok", "status-lost"),
    ("status.reset", "status-stays"),
    ("status.reset-for-the-next", "status-for-the-next"),
    ("status.nothing-after-reset", "status-reset-keeps-rings ignores-driver-ok"),
    # Split rings
    ("split.used-id", "wrong-id"),
    ("split.used-once", "uses-twice"),
    ("split.used-length-at-most", "length-too-long"),
    ("split.used-length-written", "writes-nothing"),
    ("split.no-overrun", "overruns"),
    ("split.readable-kept", "writes-readable"),
    ("split.table-kept", "writes-table"),
    ("split.available-kept", "writes-avail"),
    ("split.used-flags", "flags-odd"),
    ("split.used-flags-event-idx", "flags-with-event"),
    ("split.used-flags-obeyed", "suppresses-kicks"),
    ("split.available-event-obeyed", "event-far"),
    ("split.scattered-chain", "next-ignored"),
    ("split.full-ring", "one-a-kick"),
    ("split.around-the-ring", "slot-not-wrapped"),
    ("split.one-publication", "one-a-kick"),
    ("framing.header-in-bytes", "fixed-framing"),
    ("framing.random", "fixed-framing"),
    ("notify.used", "never-calls"),
    ("notify.used-event-ignored", "event-always"),
    ("notify.suppressed", "calls-always"),
    ("notify.event-idx-in-batch", "event-exactly"),
    ("notify.event-idx-suppressed", "event-never"),
    ("notify.event-idx-flags-ignored", "event-never"),
    ("notify.event-idx", "never-calls"),
    ("indirect.after-direct", "indirect-first-only"),
    ("indirect.write-flag-ignored", "refuses-write-flag"),
    ("indirect.scattered", "next-ignored"),
    ("indirect.table-kept", "writes-indirect"),
    ("indirect.unaligned-table", "aligned-tables"),
    # Broken rings
    ("broken.loop-of-one", "follows-loops"),
    # Memory
    ("memory.offset", "offset-ignored"),
    ("memory.several-regions", "first-descriptor"),
    ("memory.across-regions", "one-region"),
    ("memory.table-at-other-place", "table-once"),
    ("memory.revoked", "keeps-old-memory"),
    ("slots.count", "no-slots"),
    ("slots.one-too-many", "too-many-slots"),
    ("slots.remove-by-identity", "offset-compared"),
    ("slots.removed-not-reached", "never-removes"),
    ("slots.bad-remove-unknown", "removes-anything"),
    # Translation
    ("iotlb.update", "iotlb-refused"),
    ("iotlb.invalidate", "iotlb-refused"),
    ("iotlb.served", "never-asks"),
    ("iotlb.miss", "asks-elsewhere"),
    ("iotlb.miss-permission", "misses-read"),
    ("iotlb.overwrites", "update-ignored-if-known"),
    ("iotlb.invalidated-not-reached", "invalidation-ignored"),
    ("iotlb.read-only-not-written", "permission-ignored"),
    ("iotlb.unanswered-miss-stops", "hangs-at-miss"),
    # The log
    ("log.data", "data-unlogged"),
    ("log.used-ring", "used-unlogged"),
    ("log.others-not", "marks-all"),
    ("log.off", "log-always"),
    # Configuration
    ("config.read", "config-short"),
    ("config.parts", "config-from-start"),
    ("config.constant", "config-changes"),
    ("config.read-only", "config-writable"),
    ("config.size-lies", "leaks-config"),
    # Disks
    ("blk.capacity", "no-capacity"),
    ("blk.block-size", "odd-block-size"),
    ("blk.padding", "padding"),
    ("blk.write-zeroes-limits", "no-zeroes-limit"),
    ("blk.read", "reads-garbage"),
    ("blk.read-parts", "reads-start"),
    ("blk.beyond-end", "status-ok"),
    ("blk.beyond-bytes-wrap", "sector-wraps"),
    ("blk.odd-length", "status-ok"),
    ("blk.type-unknown", "unknown-fails"),
    ("blk.zone-report", "zones-fail"),
    ("blk.flush", "flush-unsupported"),
    ("blk.get-id", "id-unpadded"),
    ("blk.write-zeroes-flags", "zeroes-any-flags"),
    ("blk.write", "loses-writes"),
    ("blk.write-in-place", "writes-more"),
    ("blk.write-disabled", "serves-disabled"),
    ("blk.write-zeroes", "zeroes-nothing"),
]  # fmt: skip
"""Checks, and what is wrong with a back-end that each must find."""

OFFERS = [
    ("features.version-1", lambda bits: bits & ~(1 << 32)),
    ("features.reserved", lambda bits: bits | 1 << 45),
    ("features.sr-iov", lambda bits: bits | 1 << 37),
    ("features.admin-queue", lambda bits: bits | 1 << 41),
    ("features.of-the-type", lambda bits: bits | 1 << 20),
    ("features.requirements", lambda bits: (bits | 1 << 11) & ~(1 << 9)),
    ("blk.flush-offered", lambda bits: bits & ~(1 << 9)),
]
"""Checks, and features that a back-end must not be found to offer."""

FRAGILE = [
    each.id
    for each in catalogue("blk")
    if each.id.partition(".")[0] in {"no-ring", "ring-size"}
    or each.id
    in {
        "malformed.short-SET_VRING_NUM",
        "malformed.short-SET_VRING_ADDR",
        "malformed.short-SET_FEATURES",
        "ring-address.misaligned-desc",
        "ring-base.too-large",
        "ring-enable.other-value",
        "features.not-offered",
        "features.all",
        "protocol.not-offered",
        "status.wide",
        "descriptor.kick-directory",
        "descriptor.call-file",
        "broken.loop-of-one",
        "broken.next-at-size",
        "broken.address-nowhere",
        "broken.address-wraps",
        "broken.head-at-size",
        "broken.index-jumps",
        "broken.empty-readable",
        "broken.indirect-nowhere",
        "broken.indirect-empty",
        "broken.indirect-nested",
        "broken.writable-first",
    }
]
"""Checks of a hostile peer, which a back-end that dies of any nonsense must not survive."""

_VRING_FDS = {"no-ring.SET_VRING_KICK", "no-ring.SET_VRING_CALL", "no-ring.SET_VRING_ERR"}


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return str(tmp_path / "toy.sock")


def verdict(socket: str, name: str, *, patience: float = PATIENCE) -> tuple[Verdict, str]:
    report = check(socket, only=[name], writable=True, patience=patience, recovery=1.0)
    (result,) = report.results
    return result.verdict, result.reason


def patience_for(faults: str) -> float:
    """Seconds of patience: little where the defect is that nothing comes."""
    silent = {
        "drops-the-rest", "waits-for-payload", "keeps-surplus", "keeps-descriptors",
        "never-enabled-alone", "never-stops", "kick-once", "call-once", "slot-not-wrapped",
        "blocks-at-call", "suppresses-kicks", "event-far", "one-a-kick", "never-calls",
        "event-always", "event-exactly", "event-never", "follows-loops", "never-asks",
        "asks-elsewhere", "misses-read", "hangs-at-miss", "stops-one-early", "table-once",
        "update-ignored-if-known", "base-ignored", "inband-alone", "offset-ignored",
        "enable-forgets", "first-descriptor", "whole-messages", "one-region", "indirect-first-only",
    }  # fmt: skip
    return 2.0 if silent & set(faults.split()) else PATIENCE


@pytest.mark.parametrize(("name", "faults"), DEFECTS)
def test_a_defect_is_found(name: str, faults: str, socket: str) -> None:
    with BrokenBackend(socket, *faults.split()):
        # A defect that also breaks the honest request would be found before any check.
        found = find(socket, name, faults)
    assert found in {Verdict.FAIL, Verdict.WEDGED, Verdict.CRASH}


def find(socket: str, name: str, faults: str) -> Verdict:
    from guestio.faults.catalogue import catalogue, select
    from guestio.faults.kinds import KINDS
    from guestio.faults.link import Link
    from guestio.faults.runner import Target, _Run

    (each,) = select(catalogue("blk"), [name])
    patience = patience_for(faults)
    run = _Run(Target(socket, None, Link), KINDS["blk"], 0, None, patience, 10.0, writable=True)
    return run.examine(each)[0]


@pytest.mark.parametrize(("name", "change"), OFFERS)
def test_an_offer_is_found(name: str, change: Callable[[int], int], socket: str) -> None:
    with BrokenBackend(socket, features=change(FEATURES)):
        assert verdict(socket, name)[0] is Verdict.FAIL


@pytest.mark.parametrize("name", [each for each in FRAGILE if each not in _VRING_FDS])
def test_a_back_end_that_dies_of_nonsense_has_crashed(name: str, socket: str) -> None:
    with BrokenBackend(socket, "fragile"):
        found, reason = verdict(socket, name)
    assert found is Verdict.CRASH, reason
    assert "cannot connect" in reason


def test_many_checks_are_known_to_be_able_to_fail() -> None:
    failing = {name for name, _ in DEFECTS} | {name for name, _ in OFFERS} | set(FRAGILE)
    assert failing <= {each.id for each in catalogue("blk")}
    assert len(failing) > 150
