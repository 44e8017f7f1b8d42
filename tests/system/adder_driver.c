/* A driver of the README's adder, in user space.

   adder_driver vfio DEVICE GROUP     through vfio-pci, behind an IOMMU
                                      (by MSI if INTERRUPT is set, else by MSI-X)
   adder_driver direct DEVICE         by physical addresses, as root, without one

   It prints the sum of 3000 numbers as the device computes it, after its interrupt, and what the
   device says once the memory is unmapped (0 in direct mode, where nothing is). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { NUMBERS = 3000, ROUNDS = 20, SIZE = 0x4000, IOVA = 0x100000, COMMAND = 4 };

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void check(long result, const char *what)
{
    if (result < 0)
        die(what);
}

static volatile uint32_t *registers;

static uint32_t add(uint64_t address, uint32_t count)
{
    registers[0] = (uint32_t)address;
    registers[1] = (uint32_t)(address >> 32);
    registers[2] = count;
    registers[3] = 1;
    return 0;
}

static uint32_t *fill(uint32_t *numbers, uint32_t *sum)
{
    *sum = 0;
    for (int i = 0; i < NUMBERS; i++)
        *sum += numbers[i] = 2654435761u * (i + 1);
    return numbers;
}

static void expect(uint32_t sum)
{
    if (registers[4] != sum) {
        fprintf(stderr, "sum %#x, expected %#x\n", registers[4], sum);
        exit(1);
    }
}

static int by_vfio(const char *name, const char *group_path)
{
    int container = open("/dev/vfio/vfio", O_RDWR), group = open(group_path, O_RDWR);
    check(container, "/dev/vfio/vfio");
    check(group, group_path);
    check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "SET_CONTAINER");
    check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "SET_IOMMU");
    uint32_t sum, *numbers =
        mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    fill(numbers, &sum);
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ, .vaddr = (uintptr_t)numbers,
        .iova = IOVA, .size = SIZE,
    };
    struct vfio_iommu_type1_dma_unmap unmap = {.argsz = sizeof unmap, .iova = IOVA, .size = SIZE};
    int device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);
    check(device, "GET_DEVICE_FD");
    struct vfio_region_info config = {.argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX};
    struct vfio_region_info bar = {.argsz = sizeof bar, .index = VFIO_PCI_BAR0_REGION_INDEX};
    check(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config), "GET_REGION_INFO");
    check(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &bar), "GET_REGION_INFO");
    uint16_t command = 6;
    check(pwrite(device, &command, 2, config.offset + COMMAND), "command register");
    registers = mmap(NULL, bar.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, bar.offset);
    if (registers == MAP_FAILED)
        die("BAR 0");
    int event = eventfd(0, EFD_CLOEXEC);
    struct { struct vfio_irq_set set; int fd; } irq = {
        {.argsz = sizeof irq, .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
         .index = getenv("INTERRUPT") ? VFIO_PCI_MSI_IRQ_INDEX : VFIO_PCI_MSIX_IRQ_INDEX,
         .start = 0, .count = 1}, event,
    };
    check(ioctl(device, VFIO_DEVICE_SET_IRQS, &irq), "SET_IRQS");
    for (int i = 0; i < ROUNDS; i++) {
        check(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "MAP_DMA");
        add(IOVA, NUMBERS);
        struct pollfd poll_fd = {.fd = event, .events = POLLIN};
        if (poll(&poll_fd, 1, 20000) != 1)
            die("no interrupt");
        uint64_t count;
        check(read(event, &count, sizeof count), "eventfd");
        expect(sum);
        check(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap), "UNMAP_DMA");
    }
    printf("FACT sum=%u\n", registers[4]);
    /* Not mapped any more: the device must not reach it, and its sum stays that of no numbers. */
    add(IOVA, 0);
    add(IOVA, NUMBERS);
    printf("FACT unmapped=%u\n", registers[4]);
    return 0;
}

static uint64_t physical(void *at)
{
    uint64_t entry = 0;
    int map = open("/proc/self/pagemap", O_RDONLY);
    check(map, "pagemap");
    check(pread(map, &entry, 8, (uintptr_t)at / 4096 * 8), "pagemap");
    close(map);
    return (entry & ((1ull << 55) - 1)) * 4096;
}

static volatile uint32_t *map_bar(const char *name, int number)
{
    char path[128];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource%d", name, number);
    int fd = open(path, O_RDWR | O_SYNC);
    check(fd, path);
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        die(path);
    return at;
}

static int direct(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/config", name);
    int config = open(path, O_RDWR);
    check(config, path);
    registers = map_bar(name, 0);
    volatile uint32_t *table = map_bar(name, 1);
    uint32_t *pages =
        mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    mlock(pages, SIZE);
    /* A message of MSI-X is a write to memory: here it goes to a page of ours. */
    volatile uint32_t *message = pages + 1024;
    uint64_t where = physical((void *)message);
    uint16_t command = 6, control;
    uint8_t at;
    check(pwrite(config, &command, 2, COMMAND), "command register");
    for (pread(config, &at, 1, 0x34); at; pread(config, &at, 1, at + 1)) {
        uint8_t id;
        pread(config, &id, 1, at);
        if (id == 0x11)
            break;
    }
    check(pread(config, &control, 2, at + 2), "MSI-X");
    control |= 0x8000;
    check(pwrite(config, &control, 2, at + 2), "MSI-X");
    table[0] = (uint32_t)where;
    table[1] = (uint32_t)(where >> 32);
    table[2] = 0x1234;
    table[3] = 0;
    uint32_t sum = 0;
    for (int i = 0; i < 1024; i++)
        sum += pages[i] = 2654435761u * (i + 1);
    for (int i = 0; i < ROUNDS; i++) {
        *message = 0;
        add(physical(pages), 1024);
        for (int wait = 0; *message != 0x1234; wait++) {
            if (wait == 20000)
                die("no interrupt");
            usleep(1000);
        }
        expect(sum);
    }
    printf("FACT sum=%u\n", registers[4]);
    printf("FACT unmapped=0\n");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "vfio"))
        return by_vfio(argv[2], argv[3]);
    if (argc == 3 && !strcmp(argv[1], "direct"))
        return direct(argv[2]);
    return 2;
}
