"""The mapper and its sessions against a model of plain dictionaries."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from guestio import CannotResolveError, Permissions
from guestio.iommu import AddMapResult, BasicMemoryMapper, ExportError, MappingInfo

SPAN = 24
BASES = (0, 2**63, 2**64 - SPAN)


class Machine(RuleBasedStateMachine):
    """Addresses are offsets from a base at an edge of the address space."""

    spans = st.tuples(st.integers(0, SPAN - 1), st.integers(1, SPAN)).map(
        lambda s: (s[0], min(s[1], SPAN - s[0]))
    )

    @initialize(base=st.sampled_from(BASES), maps=st.lists(spans, max_size=3))
    def start(self, base, maps):
        self.base = base
        self.mapper = BasicMemoryMapper()
        self.maps = {}  # start: (size, gpa, prot)
        self.sessions = []  # [session, held ranges, broken]
        self.faults = []  # [event, sessions waited for]
        for span in maps:
            self.add(span, 1000 + span[0], Permissions.READ_WRITE)
        self.open()

    def touching(self, start, size):
        return [at for at, (n, _, _) in self.maps.items() if at < start + size and start < at + n]

    @rule(span=spans, gpa=st.integers(1000, 1030), prot=st.sampled_from(list(Permissions)))
    def add(self, span, gpa, prot):
        start, size = span
        result = self.mapper.add_map(MappingInfo(self.base + start, gpa, size, prot))
        if self.touching(start, size):
            assert result is AddMapResult.OVERLAP
        else:
            assert result is AddMapResult.OK
            self.maps[start] = size, gpa, prot

    def fault(self, start, size, event):
        """What the removal of a range must have done to the sessions."""
        hit = [
            entry
            for entry in self.sessions
            if not entry[2] and any(a < start + size and start < a + n for a, n in entry[1])
        ]
        assert (event is not None) == bool(hit)
        for entry in hit:
            entry[2] = True
        if hit:
            self.faults.append((event, hit))

    @rule(data=st.data())
    def remove(self, data):
        exact = [(at, n) for at, (n, _, _) in self.maps.items()]
        start, size = data.draw(self.spans | st.sampled_from([*exact, (0, SPAN)]), label="range")
        result = self.mapper.remove_map(self.base + start, size)
        met = self.touching(start, size)
        if any(at < start or at + self.maps[at][0] > start + size for at in met):
            assert result.overlap
            assert result.fault is None
            return
        assert not result.overlap
        for at in met:
            del self.maps[at]
        self.fault(start, size, result.fault)

    @rule(sure=st.integers(0, 9))
    def reset(self, sure):
        if sure == 0:
            self.fault(0, SPAN, self.mapper.reset_domain())
            self.maps.clear()

    @precondition(lambda self: len(self.sessions) < 3)
    @rule()
    def open(self):
        self.sessions.append([self.mapper.open_session(), [], False])

    def pieces(self, start, size):
        """The expected answer to an export, or None."""
        found = []
        for at in range(start, start + size):
            owner = self.touching(at, 1)
            if not owner:
                return None
            _, gpa, prot = self.maps[owner[0]]
            found.append((gpa + at - owner[0], prot))
        merged = []
        for gpa, prot in found:
            if merged and merged[-1][0] + merged[-1][1] == gpa and merged[-1][2] == prot:
                merged[-1][1] += 1
            else:
                merged.append([gpa, 1, prot])
        return [tuple(piece) for piece in merged]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def export(self, data):
        entry = data.draw(st.sampled_from(self.sessions), label="session")
        exact = [(at, n) for at, (n, _, _) in self.maps.items()]
        start, size = data.draw(self.spans | st.sampled_from([*exact, (0, 1)]), label="range")
        expected = self.pieces(start, size)
        if entry[2]:
            with pytest.raises(ExportError):
                entry[0].export(self.base + start, size)
        elif expected is None:
            with pytest.raises(CannotResolveError):
                entry[0].export(self.base + start, size)
        else:
            assert [tuple(r) for r in entry[0].export(self.base + start, size)] == expected
            entry[1].append((start, size))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from(self.sessions), label="session")
        start, size = data.draw(
            st.sampled_from([*entry[1], *entry[1], (0, 1), (3, 0)]), label="range"
        )
        entry[0].release(self.base + start, size)
        if (start, size) in entry[1]:
            entry[1].remove((start, size))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), how=st.sampled_from(["close", "revoke"]))
    def end(self, data, how):
        entry = data.draw(st.sampled_from(self.sessions), label="session")
        getattr(entry[0], how)()
        assert entry[0].revoked.is_set == (how == "revoke" and bool(entry[1]))
        entry[1].clear()
        entry[2] = True
        entry[0].close()
        self.sessions.remove(entry)

    @invariant()
    def holds(self):
        if not hasattr(self, "mapper"):
            return
        assert self.mapper.mappings() == [
            (self.base + at, n, gpa, prot) for at, (n, gpa, prot) in sorted(self.maps.items())
        ]
        for session, held, broken in self.sessions:
            assert session.broken == broken
            assert session.exports == sorted((self.base + a, n) for a, n in held)
            assert session.fault.is_set == broken
        for event, waited in self.faults:
            assert event.is_set == all(not held for _, held, _ in waited)


def test_machine():
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None)
    )
