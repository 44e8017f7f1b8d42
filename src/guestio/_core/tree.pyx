"""The B+tree under the interval map; see the declarations for what it is.

Insertions and removals allocate nothing: nodes are set aside before a change begins, so that none
fails half-way.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdint cimport UINT64_MAX
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove

from guestio._core.border cimport u32, u64

cdef enum:
    MERGE_BELOW = 16   # a node with fewer entries looks for a neighbour to join
    MERGE_UP_TO = 48   # ... and joins it if both fit in this many
    SPARES_KEPT = 64   # emptied nodes of each kind that are kept for the next insertions


cdef int open_tree(Tree *tree) except -1:
    """Make an empty tree of zeroed memory."""
    tree.root = new_node(True)
    if tree.root is NULL:
        PyErr_NoMemory()
    replace_root(tree, tree.root)
    return 0


cdef void close_tree(Tree *tree) noexcept nogil:
    if tree.root is not NULL:
        free_nodes(tree.root)
    free_list(tree.spare_leaves)
    free_list(tree.spare_inners)


cdef Node *replace_root(Tree *tree, Node *fresh) noexcept nogil:
    """Start over with an empty leaf; returns the old root, for :func:`free_nodes`."""
    cdef Node *old = tree.root
    tree.root, tree.height, tree.entries = fresh, 0, 0
    tree.first_leaf = <Leaf *>fresh
    tree.first_leaf.prev = tree.first_leaf.next = NULL
    return old


cdef int reserve(Tree *tree, int inserts) except -1:
    """Allocate ahead what ``inserts`` insertions can need, so that none fails half-way."""
    cdef Node *node
    while tree.spare_leaf_count < inserts:
        node = new_node(True)
        if node is NULL:
            PyErr_NoMemory()
        keep_spare(tree, node)
    while tree.spare_inner_count < inserts * (tree.height + 2):
        node = new_node(False)
        if node is NULL:
            PyErr_NoMemory()
        keep_spare(tree, node)
    return 0


cdef void keep_spare(Tree *tree, Node *node) noexcept nogil:
    if node.is_leaf:
        next_spare(node)[0], tree.spare_leaves = tree.spare_leaves, node
        tree.spare_leaf_count += 1
    else:
        next_spare(node)[0], tree.spare_inners = tree.spare_inners, node
        tree.spare_inner_count += 1


cdef void recycle(Tree *tree, Node *node) noexcept nogil:
    cdef int i
    if (tree.spare_leaf_count if node.is_leaf else tree.spare_inner_count) >= SPARES_KEPT:
        free(node)
        return
    for i in range(NODE_CAPACITY):
        node.key[i] = UINT64_MAX
    node.count = 0
    refresh_guide(node)
    keep_spare(tree, node)


cdef Node *take_spare(Tree *tree, bint is_leaf) noexcept nogil:
    cdef Node *node
    if is_leaf:
        node = tree.spare_leaves
        tree.spare_leaves = next_spare(node)[0]
        tree.spare_leaf_count -= 1
    else:
        node = tree.spare_inners
        tree.spare_inners = next_spare(node)[0]
        tree.spare_inner_count -= 1
    return node


cdef void insert_entry(Tree *tree, u64 first, Entry entry) noexcept nogil:
    """Insert an entry that overlaps no other. Needs one reserved insertion. O(log n)."""
    cdef Path path
    cdef Leaf *leaf = trace(tree.root, tree.height, first, &path)
    cdef Leaf *right
    cdef int at = <int>rank_of(&leaf.head, first)
    tree.entries += 1
    if leaf.head.count < NODE_CAPACITY:
        put_entry(leaf, at, first, entry)
        return
    right = <Leaf *>take_spare(tree, True)
    right.prev, right.next = leaf, leaf.next
    if leaf.next is not NULL:
        leaf.next.prev = right
        split_leaf(leaf, right)
    elif at < NODE_CAPACITY:
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
        if inner.head.count < NODE_CAPACITY:
            put_child(inner, at, key, child)
            return
        right = <Inner *>take_spare(tree, False)
        split_inner(inner, right)
        if at > <int>inner.head.count:
            put_child(right, at - <int>inner.head.count, key, child)
        else:
            put_child(inner, at, key, child)
        key, child = right.head.key[0], &right.head
        level -= 1
    inner = <Inner *>take_spare(tree, False)
    put_child(inner, 0, 0, tree.root)
    put_child(inner, 1, key, child)
    tree.root = &inner.head
    tree.height += 1


cdef void erase_entry(Tree *tree, u64 first) noexcept nogil:
    """Remove the entry that starts at ``first``. O(log n)."""
    cdef Path path
    cdef Leaf *leaf = trace(tree.root, tree.height, first, &path)
    cdef int at = <int>rank_of(&leaf.head, first) - 1
    cdef int left
    cdef Inner *parent
    cut_keys(&leaf.head, at)
    memmove(&leaf.entry[at], &leaf.entry[at + 1], (leaf.head.count - at) * sizeof(Entry))
    tree.entries -= 1
    if not tree.height or leaf.head.count >= MERGE_BELOW:
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
        # The first key of a line is in no guide.
        inner.head.key[0] = bound
    recycle(tree, gone)
    if level == 0:
        while tree.height and tree.root.count == 1:
            gone, tree.root = tree.root, (<Inner *>tree.root).child[0]
            tree.height -= 1
            recycle(tree, gone)
        return
    if inner.head.count >= MERGE_BELOW:
        return
    at = path.index[level - 1]
    if not inner.head.count:
        drop_child(tree, path, level - 1, at)
        return
    left = merge_partner(path.node[level - 1], at)
    if left >= 0:
        join_inners(path.node[level - 1], left)
        drop_child(tree, path, level - 1, left + 1)


cdef void unlink(Tree *tree, Leaf *leaf) noexcept nogil:
    if leaf.prev is not NULL:
        leaf.prev.next = leaf.next
    else:
        tree.first_leaf = leaf.next
    if leaf.next is not NULL:
        leaf.next.prev = leaf.prev


cdef inline Node **next_spare(Node *node) noexcept nogil:
    # A spare node's first key is free to hold the link.
    return <Node **>&(<Inner *>node).child[0] if not node.is_leaf else <Node **>&(<Leaf *>node).next


cdef void put_key(Node *node, int at, u64 key) noexcept nogil:
    memmove(&node.key[at + 1], &node.key[at], (node.count - at) * sizeof(u64))
    node.key[at] = key
    node.count += 1
    refresh_guide(node)


cdef void cut_keys(Node *node, int at) noexcept nogil:
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
    memcpy(&right.key[right.count], &left.key[start], moved * sizeof(u64))
    right.count += moved
    left.count = start
    for i in range(start, NODE_CAPACITY):
        left.key[i] = UINT64_MAX
    refresh_guide(left)
    refresh_guide(right)


cdef void split_leaf(Leaf *leaf, Leaf *right) noexcept nogil:
    cdef int half = NODE_CAPACITY // 2
    memcpy(&right.entry[0], &leaf.entry[half], (NODE_CAPACITY - half) * sizeof(Entry))
    move_keys(&leaf.head, half, &right.head)


cdef void split_inner(Inner *inner, Inner *right) noexcept nogil:
    cdef int half = NODE_CAPACITY // 2
    memcpy(&right.child[0], &inner.child[half], (NODE_CAPACITY - half) * sizeof(Node *))
    move_keys(&inner.head, half, &right.head)


cdef int merge_partner(Inner *parent, int at) noexcept nogil:
    """Index of the left one of two neighbours that include ``at`` and fit in one node, or -1."""
    cdef u32 count = parent.child[at].count
    if at + 1 < <int>parent.head.count and count + parent.child[at + 1].count <= MERGE_UP_TO:
        return at
    if at > 0 and count + parent.child[at - 1].count <= MERGE_UP_TO:
        return at - 1
    return -1


cdef void join_leaves(Leaf *left, Leaf *right) noexcept nogil:
    memcpy(&left.entry[left.head.count], &right.entry[0], right.head.count * sizeof(Entry))
    move_keys(&right.head, 0, &left.head)


cdef void join_inners(Inner *parent, int at) noexcept nogil:
    cdef Inner *left = <Inner *>parent.child[at]
    cdef Inner *right = <Inner *>parent.child[at + 1]
    right.head.key[0] = parent.head.key[at + 1]
    memcpy(&left.child[left.head.count], &right.child[0], right.head.count * sizeof(Node *))
    move_keys(&right.head, 0, &left.head)


cdef void free_nodes(Node *node) noexcept nogil:
    cdef u32 i
    if not node.is_leaf:
        for i in range(node.count):
            free_nodes((<Inner *>node).child[i])
    free(node)


cdef void free_list(Node *node) noexcept nogil:
    cdef Node *following
    while node is not NULL:
        following = next_spare(node)[0]
        free(node)
        node = following


cdef int check_tree(const Tree *tree) except -1:
    """Walk every invariant of the structure; for tests."""
    cdef Leaf *leaf = tree.first_leaf
    cdef size_t total = 0
    assert leaf.prev is NULL
    check_node(tree.root, tree.height, 0, UINT64_MAX)
    while leaf is not NULL:
        assert leaf.next is NULL or leaf.next.prev is leaf
        total += leaf.head.count
        leaf = leaf.next
    assert total == tree.entries, (total, tree.entries)
    return 0


cdef int check_node(Node *node, int height, u64 low, u64 high) except -1:
    cdef u32 i
    assert bool(node.is_leaf) == (height == 0)
    assert height == 0 or node.count > 0
    for i in range(node.count):
        assert low <= node.key[i] <= high, "a key out of its parent's bounds"
        assert i == 0 or node.key[i - 1] < node.key[i]
        if height:
            check_node(
                (<Inner *>node).child[i], height - 1, node.key[i],
                node.key[i + 1] - 1 if i + 1 < node.count else high,
            )
    for i in range(node.count, <u32>NODE_CAPACITY):
        assert node.key[i] == UINT64_MAX
    for i in range(<u32>LINES):
        assert node.guide[i] == node.key[i * LINE + LINE - 1], "a guide that was not kept"
    return 0
