"""The B+tree under the interval map; see the declarations for what it is.

Insertions and removals allocate nothing: room for nodes is made before a change begins, so that
none fails half-way.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdint cimport UINT64_MAX, uint16_t
from libc.string cimport memcpy, memmove, memset

from guestio._core.base.checks cimport u32, u64
from guestio._core.base.capacity cimport (
    GUESTIO_ASSERT, SLAB_SPARES_KEPT, TREE_APPEND_UP_TO, TREE_FANOUT, TREE_LINE, TREE_MAX_HEIGHT,
    TREE_MERGE_BELOW, TREE_MERGE_UP_TO,
)
from guestio._core.iommu.slabs cimport Slab, add_slab, drop_slabs, return_slot, take_slot


cdef int open_tree(Tree *tree) except -1:
    """Make an empty tree, whatever the memory holds."""
    memset(tree, 0, sizeof(Tree))
    reserve(tree, 1)
    tree.root = take_node(tree, True)
    tree.first_leaf = <Leaf *>tree.root
    tree.first_leaf.prev = tree.first_leaf.next = NULL
    return 0


cdef void close_tree(Tree *tree) noexcept nogil:
    """Free all memory of a tree that was opened or is zeroed."""
    drop_slabs(&tree.nodes)


cdef int reserve(Tree *tree, int inserts) except -1:
    """Allocate ahead what ``inserts`` insertions can need, so that none fails half-way."""
    # Each may split a leaf and every node above it, and grow a root.
    tree.reserved = <size_t>inserts * (tree.height + 3)
    while tree.nodes.room < tree.reserved:
        if add_slab(&tree.nodes, sizeof(Leaf)):
            PyErr_NoMemory()
    return 0


cdef Node *take_node(Tree *tree, bint is_leaf) noexcept nogil:
    # Inner nodes are few; one size of slots does for both.
    cdef unsigned slot
    cdef Node *node
    GUESTIO_ASSERT(tree.nodes.room > 0)
    node = <Node *>take_slot(&tree.nodes, sizeof(Leaf), &slot)
    open_node(node, is_leaf)
    node.slot = <uint16_t>slot
    return node


cdef inline void recycle(Tree *tree, Node *node) noexcept nogil:
    cdef size_t room = tree.nodes.room
    # What was reserved stays: a change may remove before it inserts.
    return_slot(
        &tree.nodes, sizeof(Leaf), node, node.slot, max(<size_t>SLAB_SPARES_KEPT, tree.reserved)
    )
    GUESTIO_ASSERT(tree.nodes.room > room or tree.nodes.room >= tree.reserved)


cdef void insert_entry(Tree *tree, u64 first, Entry entry) noexcept nogil:
    """Insert an entry that overlaps no other. Needs one reserved insertion. O(log n)."""
    cdef Path path
    cdef Leaf *leaf = trace(tree.root, tree.height, first, &path)
    cdef Leaf *right
    cdef int at = <int>rank_of(&leaf.head, first)
    tree.entries += 1
    if <int>leaf.head.count < (
        TREE_APPEND_UP_TO if leaf.next is NULL and at == <int>leaf.head.count else TREE_FANOUT
    ):
        put_entry(leaf, at, first, entry)
        return
    right = <Leaf *>take_node(tree, True)
    right.prev, right.next = leaf, leaf.next
    if leaf.next is not NULL:
        leaf.next.prev = right
        split_leaf(leaf, right)
    elif at < <int>leaf.head.count:
        split_leaf(leaf, right)
    leaf.next = right
    if at > <int>leaf.head.count or (at == <int>leaf.head.count and not right.head.count):
        put_entry(right, at - <int>leaf.head.count, first, entry)
    else:
        put_entry(leaf, at, first, entry)
    insert_child(tree, &path, right.head.key[0], &right.head)


cdef void insert_child(Tree *tree, Path *path, u64 key, Node *child) noexcept nogil:
    cdef int level = tree.height - 1
    cdef Inner *inner
    cdef Inner *right
    cdef int at
    while level >= 0:
        inner, at = path.node[level], path.index[level] + 1
        if inner.head.count < TREE_FANOUT:
            put_child(inner, at, key, child)
            return
        right = <Inner *>take_node(tree, False)
        split_inner(inner, right)
        if at > <int>inner.head.count:
            put_child(right, at - <int>inner.head.count, key, child)
        else:
            put_child(inner, at, key, child)
        key, child = right.head.key[0], &right.head
        level -= 1
    inner = <Inner *>take_node(tree, False)
    put_child(inner, 0, 0, tree.root)
    put_child(inner, 1, key, child)
    tree.root = &inner.head
    tree.height += 1
    GUESTIO_ASSERT(tree.height < TREE_MAX_HEIGHT)


cdef void erase_entry(Tree *tree, u64 first) noexcept nogil:
    """Remove the entry that starts at ``first``. O(log n)."""
    cdef Path path
    cdef Leaf *leaf = trace(tree.root, tree.height, first, &path)
    cdef int at = <int>rank_of(&leaf.head, first) - 1
    cdef int left
    cdef Inner *parent
    GUESTIO_ASSERT(at >= 0)
    GUESTIO_ASSERT(leaf.head.key[at] == first)
    cut_keys(&leaf.head, at)
    memmove(&leaf.entry[at], &leaf.entry[at + 1], (leaf.head.count - at) * sizeof(Entry))
    tree.entries -= 1
    if not tree.height or leaf.head.count >= TREE_MERGE_BELOW:
        return
    parent, at = path.node[tree.height - 1], path.index[tree.height - 1]
    if not leaf.head.count:
        drop_child(tree, &path, tree.height - 1, at)
        return
    left = merge_partner(parent, at)
    if left >= 0:
        join_leaves(<Leaf *>parent.child[left], <Leaf *>parent.child[left + 1])
        drop_child(tree, &path, tree.height - 1, left + 1)


cdef void drop_child(Tree *tree, Path *path, int level, int at) noexcept nogil:
    """Remove an emptied child and mend the levels above."""
    cdef Inner *inner = path.node[level]
    cdef Node *gone = inner.child[at]
    cdef u64 bound = inner.head.key[0]
    cdef int left
    if gone.is_leaf:
        unlink(tree, <Leaf *>gone)
    cut_keys(&inner.head, at)
    memmove(&inner.child[at], &inner.child[at + 1], (inner.head.count - at) * sizeof(Node *))
    if inner.head.count:
        lower_bound_of(&inner.head, bound)
    recycle(tree, gone)
    if level == 0:
        while tree.height and tree.root.count == 1:
            gone, tree.root = tree.root, (<Inner *>tree.root).child[0]
            tree.height -= 1
            recycle(tree, gone)
        return
    if inner.head.count >= TREE_MERGE_BELOW:
        return
    at = path.index[level - 1]
    if not inner.head.count:
        drop_child(tree, path, level - 1, at)
        return
    left = merge_partner(path.node[level - 1], at)
    if left >= 0:
        join_inners(path.node[level - 1], left)
        drop_child(tree, path, level - 1, left + 1)


cdef void lower_bound_of(Node *node, u64 bound) noexcept nogil:
    """Let an inner node begin at a lower address, and with it all that begin where it does.

    Whatever a search compares with lies at or above the first key of the node, or else it would
    leave the node to the left of its first child.
    """
    while not node.is_leaf:
        node.key[0] = bound
        refresh_guide(node)
        node = (<Inner *>node).child[0]


cdef void unlink(Tree *tree, Leaf *leaf) noexcept nogil:
    if leaf.prev is not NULL:
        leaf.prev.next = leaf.next
    else:
        tree.first_leaf = leaf.next
    if leaf.next is not NULL:
        leaf.next.prev = leaf.prev


cdef void put_key(Node *node, int at, u64 key) noexcept nogil:
    GUESTIO_ASSERT(node.count < <u32>TREE_FANOUT)
    GUESTIO_ASSERT(<u32>at <= node.count)
    memmove(&node.key[at + 1], &node.key[at], (node.count - at) * sizeof(u64))
    node.key[at] = key
    node.count += 1
    refresh_guide(node)
    GUESTIO_ASSERT(rank_of(node, key) == <u32>at + 1)


cdef void cut_keys(Node *node, int at) noexcept nogil:
    GUESTIO_ASSERT(<u32>at < node.count)
    node.count -= 1
    memmove(&node.key[at], &node.key[at + 1], (node.count - at) * sizeof(u64))
    node.key[node.count] = UINT64_MAX
    refresh_guide(node)


cdef void put_entry(Leaf *leaf, int at, u64 first, Entry entry) noexcept nogil:
    memmove(&leaf.entry[at + 1], &leaf.entry[at], (leaf.head.count - at) * sizeof(Entry))
    leaf.entry[at] = entry
    put_key(&leaf.head, at, first)


cdef void put_child(Inner *inner, int at, u64 key, Node *child) noexcept nogil:
    memmove(&inner.child[at + 1], &inner.child[at], (inner.head.count - at) * sizeof(Node *))
    inner.child[at] = child
    put_key(&inner.head, at, key)


cdef void move_keys(Node *left, int start, Node *right) noexcept nogil:
    cdef int i, moved = <int>left.count - start
    GUESTIO_ASSERT(moved >= 0)
    GUESTIO_ASSERT(<int>right.count + moved <= TREE_FANOUT)
    memcpy(&right.key[right.count], &left.key[start], moved * sizeof(u64))
    right.count += moved
    left.count = start
    for i in range(start, TREE_FANOUT):
        left.key[i] = UINT64_MAX
    refresh_guide(left)
    refresh_guide(right)


cdef void split_leaf(Leaf *leaf, Leaf *right) noexcept nogil:
    cdef int half = TREE_FANOUT // 2
    memcpy(&right.entry[0], &leaf.entry[half], (TREE_FANOUT - half) * sizeof(Entry))
    move_keys(&leaf.head, half, &right.head)


cdef void split_inner(Inner *inner, Inner *right) noexcept nogil:
    cdef int half = TREE_FANOUT // 2
    memcpy(&right.child[0], &inner.child[half], (TREE_FANOUT - half) * sizeof(Node *))
    move_keys(&inner.head, half, &right.head)


cdef int merge_partner(Inner *parent, int at) noexcept nogil:
    """Index of the left one of two neighbors that include ``at`` and fit in one node, or -1."""
    cdef u32 count = parent.child[at].count
    if at + 1 < <int>parent.head.count and count + parent.child[at + 1].count <= TREE_MERGE_UP_TO:
        return at
    if at > 0 and count + parent.child[at - 1].count <= TREE_MERGE_UP_TO:
        return at - 1
    return -1


cdef void join_leaves(Leaf *left, Leaf *right) noexcept nogil:
    memcpy(&left.entry[left.head.count], &right.entry[0], right.head.count * sizeof(Entry))
    move_keys(&right.head, 0, &left.head)


cdef void join_inners(Inner *parent, int at) noexcept nogil:
    cdef Inner *left = <Inner *>parent.child[at]
    cdef Inner *right = <Inner *>parent.child[at + 1]
    memcpy(&left.child[left.head.count], &right.child[0], right.head.count * sizeof(Node *))
    move_keys(&right.head, 0, &left.head)


cdef int check_tree(const Tree *tree) except -1:
    """Walk every invariant of the structure; for tests."""
    cdef Leaf *next_leaf = tree.first_leaf
    cdef size_t total = 0, nodes = 0
    assert tree.height == 0 or tree.root.count > 1, "a root with a single child"
    check_node(tree.root, tree.height, 0, UINT64_MAX, &next_leaf, &total, &nodes)
    assert next_leaf is NULL, "a leaf that no node leads to"
    assert total == tree.entries, (total, tree.entries)
    check_slabs(tree, nodes)
    return 0


cdef int check_slabs(const Tree *tree, size_t nodes) except -1:
    cdef Slab *slab = tree.nodes.roomy
    cdef size_t used = 0, room = 0
    while slab is not NULL:
        assert slab.used < slab.slots
        used, room, slab = used + slab.used, room + slab.slots - slab.used, slab.next
    slab = tree.nodes.full
    while slab is not NULL:
        assert slab.used == slab.slots
        used, slab = used + slab.used, slab.next
    assert (used, room) == (nodes, tree.nodes.room), "slots were lost"
    return 0


cdef int check_node(
    Node *node, int height, u64 low, u64 high, Leaf **next_leaf, size_t *total, size_t *nodes
) except -1:
    """A node that is searched for all of ``[low, high]`` and nothing else, and those below it."""
    cdef u32 i
    cdef Leaf *leaf = <Leaf *>node
    nodes[0] += 1
    assert node.is_leaf == (height == 0)
    assert node.count <= <u32>TREE_FANOUT
    for i in range(node.count):
        assert low <= node.key[i] <= high, "a key out of its parent's bounds"
        assert i == 0 or node.key[i - 1] < node.key[i], "keys out of order"
    for i in range(node.count, <u32>TREE_FANOUT):
        assert node.key[i] == UINT64_MAX, "an unused key that is used"
    for i in range(<u32>TREE_LINE - 1):
        assert node.guide[i] == node.key[i * TREE_LINE + TREE_LINE - 1], "a guide that was not kept"
    if height:
        assert node.count > 0, "an inner node without children"
        assert node.key[0] == low, "an inner node that does not begin where its parent says"
        for i in range(node.count):
            check_node(
                (<Inner *>node).child[i], height - 1, node.key[i],
                node.key[i + 1] - 1 if i + 1 < node.count else high, next_leaf, total, nodes,
            )
        return 0
    assert leaf is next_leaf[0], "leaves are linked in another order"
    assert leaf.next is NULL or leaf.next.prev is leaf
    assert (leaf.prev is NULL) == (total[0] == 0), "the first leaf has none before it"
    assert node.count > 0 or low == 0 and high == UINT64_MAX, "an empty leaf"
    for i in range(node.count):
        assert node.key[i] <= leaf.entry[i].last, "an entry without a byte"
        assert i + 1 == node.count or leaf.entry[i].last < node.key[i + 1], "entries overlap"
        assert leaf.entry[i].perm <= 3
    total[0] += node.count
    next_leaf[0] = leaf.next
    return 0
