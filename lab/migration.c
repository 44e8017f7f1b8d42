/* A load that finds memory which did not migrate with its guest.

   Each worker has slots, memory that nothing but the disk writes, and blocks of the disk. It reads
   a block into a slot and remembers which, of which generation. Much later, when it comes to that
   slot again, it compares: a page that was left behind is found then, not only if it was in use
   when the guest moved. Every fourth time it writes a new generation of a block.

   Once a second a line tells the requests of all workers, what was wrong, the longest time without
   any request in milliseconds, and how many workers did none in the last 20 seconds.

   load DISK WORKERS */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 16384, BLOCKS = 48, SLOTS = 128, WORDS = BLOCK / 8, STUCK_MS = 20000 };

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

int main(int count, char **argument)
{
    if (count != 3) {
        fprintf(stderr, "load DISK WORKERS\n");
        return 2;
    }
    unsigned workers = (unsigned)atoi(argument[2]);
    struct shared *all = pages(workers * sizeof *all);
    for (unsigned w = 0; w < workers; w++) {
        all[w].last = now_ms();
        if (fork())
            continue;
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
            usleep(2000);
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
