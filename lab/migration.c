/* A load that finds memory which did not migrate with its guest.

   With a disk, each worker has slots, memory that nothing but the disk writes, and blocks of the
   disk. It reads a block into a slot and remembers which, of which generation. Much later, when it
   comes to that slot again, it compares: a page that was left behind is found then, not only if it
   was in use when the guest moved. Every fourth time it writes a new generation of a block.

   With an IPv4 address, each worker has a host there echo datagrams (UDP, port 7), and compares.
   What is lost it sends again.

   With `memory`, no device takes part: each worker writes the number of its round to pages of its
   own every now and then, and finds that of the round before in them. It makes no system calls, so
   the processor keeps what it knows about those pages for long.

   Once a second a line tells the requests of all workers, what was wrong, the longest time without
   any request in milliseconds, and how many workers did none in the last 20 seconds.

   load DISK|ADDRESS|memory WORKERS */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 16384, BLOCKS = 48, SLOTS = 128, WORDS = BLOCK / 8, STUCK_MS = 20000 };
enum { DATAGRAM = 1024, PAGE_WORDS = 512, PAGES = 128, PAUSE = 10000000 };

struct shared {
    volatile uint64_t ops, bad, last;
};

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

static uint64_t word(uint64_t block, uint64_t generation, unsigned at)
{
    uint64_t x = (block << 40 ^ generation << 16 ^ at) * 0x9E3779B97F4A7C15ull;
    return x ^ x >> 29;
}

static int wrong(const uint64_t *data, uint64_t block, uint64_t generation)
{
    for (unsigned i = 0; i < WORDS; i++)
        if (data[i] != word(block, generation, i))
            return 1;
    return 0;
}

static void fill(uint64_t *data, uint64_t block, uint64_t generation)
{
    for (unsigned i = 0; i < WORDS; i++)
        data[i] = word(block, generation, i);
}

static void *pages(size_t size)
{
    void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return made;
}

static void complain(struct shared *mine, const char *what, uint64_t block, uint64_t generation)
{
    if (mine->bad++ < 5)
        printf("%s block %llu generation %llu\n", what, (unsigned long long)block,
               (unsigned long long)generation);
    fflush(stdout);
}

static void work(int fd, unsigned worker, struct shared *mine)
{
    static uint64_t generation[BLOCKS];
    static struct { uint64_t block, generation; int filled; } holds[SLOTS];
    unsigned char *slots = pages((size_t)SLOTS * BLOCK);
    uint64_t *out = pages(BLOCK);
    unsigned seed = worker + 1;
    for (unsigned b = 0; b < BLOCKS; b++) {
        uint64_t block = (uint64_t)worker * BLOCKS + b;
        fill(out, block, 0);
        if (pwrite(fd, out, BLOCK, block * BLOCK) != BLOCK)
            complain(mine, "WRITE", block, 0);
        mine->ops++;
        mine->last = now_ms();
    }
    for (;;) {
        unsigned s = rand_r(&seed) % SLOTS, b = rand_r(&seed) % BLOCKS;
        uint64_t block = (uint64_t)worker * BLOCKS + b;
        uint64_t *slot = (uint64_t *)(slots + (size_t)s * BLOCK);
        if (holds[s].filled && wrong(slot, holds[s].block, holds[s].generation))
            complain(mine, "STALE", holds[s].block, holds[s].generation);
        if (pread(fd, slot, BLOCK, block * BLOCK) != BLOCK)
            complain(mine, "READ", block, generation[b]);
        if (wrong(slot, block, generation[b]))
            complain(mine, "DISK", block, generation[b]);
        holds[s].block = block;
        holds[s].generation = generation[b];
        holds[s].filled = 1;
        if (rand_r(&seed) % 4 == 0) {
            fill(out, block, ++generation[b]);
            if (pwrite(fd, out, BLOCK, block * BLOCK) != BLOCK)
                complain(mine, "WRITE", block, generation[b]);
        }
        mine->ops++;
        mine->last = now_ms();
    }
}

static void echo(const char *address, unsigned worker, struct shared *mine)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(7)};
    struct timeval patience = {.tv_usec = 200000};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (!inet_aton(address, &to.sin_addr) || connect(fd, (void *)&to, sizeof to) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience)) {
        perror(address);
        _exit(1);
    }
    uint64_t out[DATAGRAM / 8], in[DATAGRAM / 8 + 1];
    for (uint64_t turn = 1;; turn++) {
        out[0] = turn;
        for (unsigned i = 1; i < DATAGRAM / 8; i++)
            out[i] = word(worker, turn, i);
        for (in[0] = 0; in[0] != turn;) {
            send(fd, out, DATAGRAM, 0);
            ssize_t got;
            // One that was taken for lost may be answered after all.
            while ((got = recv(fd, in, sizeof in, 0)) > 0 && in[0] < turn)
                ;
            if (got <= 0)
                in[0] = 0;
            else if (got != DATAGRAM || memcmp(in, out, DATAGRAM))
                complain(mine, "ECHO", worker, turn);
        }
        mine->ops++;
        mine->last = now_ms();
    }
}

static void count_in_memory(unsigned worker, struct shared *mine)
{
    volatile uint64_t *all = pages(PAGES * PAGE_WORDS * 8);
    for (uint64_t turn = 1;; turn++) {
        for (unsigned p = 0; p < PAGES; p++) {
            volatile uint64_t *page = all + p * PAGE_WORDS;
            if (page[0] != turn - 1 || page[PAGE_WORDS - 1] != turn - 1)
                complain(mine, "MEMORY", worker, turn);
            page[0] = page[PAGE_WORDS - 1] = turn;
        }
        mine->ops++;
        mine->last = now_ms();
        // A page that is written all the time is told of in the end, however often it is forgotten.
        for (volatile unsigned i = 0; i < PAUSE; i++)
            ;
    }
}

int main(int count, char **argument)
{
    if (count != 3) {
        fprintf(stderr, "load DISK|ADDRESS|memory WORKERS\n");
        return 2;
    }
    int is_disk = argument[1][0] == '/', is_memory = !strcmp(argument[1], "memory");
    unsigned workers = (unsigned)atoi(argument[2]);
    struct shared *all = pages(workers * sizeof *all);
    for (unsigned w = 0; w < workers; w++) {
        all[w].last = now_ms();
        if (fork())
            continue;
        if (is_memory)
            count_in_memory(w, &all[w]);
        if (!is_disk)
            echo(argument[1], w, &all[w]);
        int fd = open(argument[1], O_RDWR | O_DIRECT);
        if (fd < 0) {
            perror(argument[1]);
            _exit(1);
        }
        work(fd, w, &all[w]);
    }
    for (uint64_t longest = 0, before = 0, since = now_ms();;) {
        uint64_t end = now_ms() + 1000, ops = 0, bad = 0, stuck = 0;
        for (uint64_t now = now_ms(); now < end; now = now_ms()) {
            uint64_t sum = 0;
            for (unsigned w = 0; w < workers; w++)
                sum += all[w].ops;
            if (sum != before) {
                if (now - since > longest)
                    longest = now - since;
                before = sum;
                since = now;
            }
            // Each look has a processor forget what it knows about the workers' pages.
            usleep(is_memory ? 500000 : 2000);
        }
        for (unsigned w = 0; w < workers; w++) {
            ops += all[w].ops;
            bad += all[w].bad;
            // Read first: what a worker does meanwhile must not be later than now.
            uint64_t last = all[w].last, now = now_ms();
            stuck += now > last && now - last > STUCK_MS;
        }
        printf("LOAD ops=%llu bad=%llu gap=%llu stuck=%llu\n", (unsigned long long)ops,
               (unsigned long long)bad, (unsigned long long)longest, (unsigned long long)stuck);
        fflush(stdout);
        longest = 0;
    }
}
