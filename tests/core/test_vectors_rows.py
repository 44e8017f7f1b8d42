"""Which test is which row of the test vectors, and which rows have no counterpart here.

The vectors are tables of cases with the outcome that the originals' own tests, or a run of the
originals, gave. A row is named by its section and its place in that section's table.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SECTIONS = {
    "1": ("address arithmetic", 15),
    "2": ("permissions", 2),
    "3.1": ("bytes", 8),
    "3.2": ("volatile memory", 35),
    "3.3": ("streams", 9),
    "4.1": ("collections", 13),
    "4.2": ("access", 22),
    "4.3": ("access, measured", 10),
    "4.4": ("atomic maps", 3),
    "4.5": ("Xen mapping flags", 4),
    "5": ("bitmaps", 15),
    "6": ("byte order and atomic integers", 2),
    "7": ("IOTLB", 13),
    "7.2": ("IOTLB, measured: x1 to x14", 14),
    "8": ("memory behind an IOMMU", 15),
    "8.2": ("memory behind an IOMMU, measured", 10),
}

COVERED = {
    "core/test_vectors_address.py": {
        "test_arithmetic": "1: 1-3 5 6 8 10-14",
        "test_alignment_must_be_a_power_of_two": "1: 7",
        "test_addresses_are_ints": "1: 4 8 9 15",
        "test_permission_algebra": "2: 1",
        "test_what_a_grant_allows": "2: 2",
    },
    "memory/test_vectors_slices.py": {
        "test_3_1_1_partial_writes_to_a_container": "3.1: 1",
        "test_3_1_2_objects_need_exactly_their_bytes": "3.1: 2",
        "test_3_1_3_a_structure_from_bytes": "3.1: 3",
        "test_3_1_4_a_structure_from_a_short_stream": "3.1: 4",
        "test_3_1_5_a_structure_to_a_short_sink": "3.1: 5",
        "test_3_1_6_a_zeroed_structure": "3.1: 6",
        "test_3_1_7_an_object_at_the_end": "3.1: 7",
        "test_3_1_8_atomics": "3.1: 8",
        "test_3_2_1_offsets_are_checked": "3.2: 1",
        "test_3_2_2_to_4_where_a_piece_may_end": "3.2: 2-4",
        "test_3_2_5_an_atomic_that_leaves_the_slice": "3.2: 5",
        "test_subslices_of_100_bytes": "3.2: 6-9 13 14",
        "test_3_2_10_to_12_tails_and_pieces": "3.2: 10-12",
        "test_3_2_15_to_17_references_stay_inside": "3.2: 14-17",
        "test_3_2_18_to_24_partial_and_exact": "3.2: 18-24",
        "test_3_2_25_an_unaligned_reference": "3.2: 25",
        "test_3_2_26_a_stream_shorter_than_the_object": "3.2: 26",
        "test_3_2_27_to_29_whole_elements": "3.2: 27-29",
        "test_3_2_30_between_slices": "3.2: 30",
        "test_3_2_31_and_32_arrays_in_place": "3.2: 31 32",
        "test_splits": "3.2: 33",
        # The alignment of a pointer is a helper there; what it is for is tested instead.
        "test_3_2_34_aligned_values_are_never_torn": "3.2: 34",
        "test_3_2_35_an_object_across_two_regions": "3.2: 35",
        "test_reading_into_the_first_four_bytes": "3.3: 1-3",
        "test_3_3_4_an_exact_read_of_too_little": "3.3: 4",
        "test_3_3_5_and_6_writing_to_a_sink": "3.3: 5",
        "test_3_3_6_a_file_gets_exactly_the_bytes": "3.3: 6",
        "test_3_3_7_a_source_with_a_position": "3.3: 7",
        "test_3_3_8_a_sink_with_room_for_seven": "3.3: 8",
        "test_3_3_9_a_sink_that_grows": "3.3: 9",
    },
    "memory/test_vectors_regions.py": {
        "test_refused_collections": "4.1: 1-3 12",
        "test_4_1_4_neighbours_and_the_empty_one": "4.1: 4",
        "test_4_1_5_to_8_insert_and_remove": "4.1: 5-8",
        "test_4_1_9_addresses_in_range": "4.1: 9",
        "test_4_1_10_and_11_offsets": "4.1: 10 11",
        "test_4_1_13_remove_the_only_region": "4.1: 13",
        "test_4_2_1_and_2_where_an_address_is": "4.2: 1 2",
        "test_4_2_3_and_4_check_range": "4.2: 3 4",
        "test_4_2_5_and_6_objects": "4.2: 5 6",
        "test_4_2_7_partial_transfers": "4.2: 7",
        "test_4_2_8_across_regions": "4.2: 8",
        "test_4_2_9_streams": "4.2: 9",
        "test_a_range_as_one_slice": "4.2: 10-12; 4.3: 4",
        "test_slices": "4.2: 13-17",
        "test_4_2_18_a_stream_across_regions": "4.2: 18",
        "test_4_2_19_zero_lengths": "4.2: 19",
        "test_4_2_20_the_same_memory_at_another_address": "4.2: 20",
        "test_4_2_21_refused_mappings": "4.2: 21",
        "test_4_2_22_regions_that_share_bytes_of_a_file": "4.2: 22",
        "test_4_3_1_and_2_partial_results": "4.3: 1 2",
        "test_4_3_3_atomics_that_cannot_be": "4.3: 3",
        "test_4_3_5_ends": "4.3: 5",
        "test_4_3_6_regions_at_the_end_of_the_space": "4.3: 6",
        "test_4_3_7_to_9_streams": "4.3: 7-9",
        "test_4_4_1_and_2_snapshots": "4.4: 1 2",
        "test_4_4_3_replacing_a_map": "4.4: 3",
    },
    "memory/test_defects.py": {
        "test_a1_a_short_read_ends_the_transfer": "4.3: 10",
    },
    "memory/test_vectors_bitmaps.py": {
        "test_sizes": "5: 1 13",
        "test_5_2_set_copy_reset_harvest": "5: 2",
        "test_5_3_reset_of_a_range": "5: 3",
        "test_5_4_beyond_the_end": "5: 4",
        "test_5_5_enlarge": "5: 5",
        "test_5_6_a_slice_of_a_bitmap": "5: 6",
        "test_5_7_every_write_marks_its_page": "5: 7",
        "test_5_8_slices_know_where_they_are": "5: 8",
        "test_5_9_copies_mark_their_destination": "5: 9",
        "test_5_10_copies_from_buffers": "5: 10",
        "test_5_11_single_values": "5: 11",
        "test_5_12_a_slice_taken_before": "5: 12",
        "test_edges_of_a_mark": "5: 14",
        "test_5_14_a_mark_past_the_space_is_refused": "5: 14",
        "test_5_15_a_slice_does_not_wrap": "5: 15",
        "test_6_1_byte_order": "6: 1",
        "test_6_2_atomic_integers": "6: 2",
    },
    "iommu/test_iotlb_vectors.py": {
        "test_lookups": "7: 1-13; 7.2: 4-14",
        "test_where_a_mapping_may_end": "7.2: 1-3",
    },
    "iommu/test_memory_vectors.py": {
        "test_8_pre_mapped": "8: 1-4",
        "test_8_live_nothing_is_mapped": "8: 5 6",
        "test_8_live_resolving_while_in_use": "8: 7-9",
        "test_8_replace": "8: 10-12",
        "test_8_dirty": "8: 13-15",
        "test_8_2_1_writes_are_marked_by_iova": "8.2: 1",
        "test_8_2_2_and_3_refused_writes_move_nothing": "8.2: 2 3",
        "test_8_2_4_a_target_without_memory": "8.2: 4",
        "test_8_2_5_a_target_with_memory_for_a_part": "8.2: 5",
        "test_8_2_6_empty_writes": "8.2: 6",
        "test_8_2_7_an_object_over_two_translations": "8.2: 7",
        "test_8_2_8_slices": "8.2: 8",
        "test_8_2_9_and_10_disabled": "8.2: 9 10",
    },
}

NO_COUNTERPART = {
    "4.5: 1-4": "mappings of Xen guests (foreign memory, grants) are not offered",
}
PARTS_WITHOUT = {
    "1: 12": "unchecked arithmetic: there is only the checked and the overflowing kind",
    "3.1: 2": "casting bytes to a type in place: objects are copied, at any alignment",
    "4.2: 21": "MAP_FIXED and raw pointers: flags of mmap are not exposed, memory of this process "
    "is adopted as a buffer",
    "4.4: 1": "into_inner: a snapshot is the collection itself",
    "6: 1": "conversion and comparison of wrapper types: values are Python integers",
}


def rows(text: str) -> set[str]:
    """``"4.2: 1 3-5; 4.3: 4"`` as the names of the rows."""
    found = set()
    for part in text.split(";"):
        section, _, numbers = part.strip().partition(": ")
        for number in numbers.split():
            first, _, last = number.partition("-")
            found |= {f"{section}-{n}" for n in range(int(first), int(last or first) + 1)}
    return found


def test_every_row_is_tested_or_has_a_reason():
    known = {f"{section}-{n + 1}" for section, (_, count) in SECTIONS.items() for n in range(count)}
    covered = set().union(*(rows(text) for tests in COVERED.values() for text in tests.values()))
    excused = set().union(*map(rows, NO_COUNTERPART))
    assert covered | excused == known
    assert not covered & excused
    assert all(rows(text) <= covered for text in PARTS_WITHOUT)


@pytest.mark.parametrize("path", COVERED)
def test_the_tests_exist(path):
    defined = {
        node.name
        for node in ast.parse((TESTS / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(COVERED[path]) <= defined
