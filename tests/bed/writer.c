// The writer of the test guest: see README.md beside this file for the commands and for what is written.
//
// Two rules shape this program. What it writes is a function of (seed, thread, number) alone, so nothing about a
// write may depend on time, on answers or on other threads. And a thread never starts write n+1 before write n has
// completed: the tests take the order of a thread's writes as the truth about time.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
#define MAX_DISKS 64
#define MAX_WRITE (8 * 4096)
#define SECTOR 512
#define ALIGN 4096 // O_DIRECT buffers: enough for any logical block size
#define NANOS 1000000000ull
// A thread that is this late gives up its missed turns: a stall of the disk must not be followed by a burst that
// the rate was meant to rule out.
#define LATE_NS (NANOS / 10)
#define RETRY_NS (NANOS / 10)

// Latency buckets: 32 per power of two of nanoseconds, so that a quantile is off by 3 per cent at most.
#define SUB_BITS 5
#define SUB (1u << SUB_BITS)
#define BUCKETS ((64 - SUB_BITS + 1) * SUB)

struct disk {
    char serial[128];
    int fd;
    uint64_t bytes;
};

struct thread {
    pthread_t id;
    uint32_t index;
    unsigned char *buffer;
    _Atomic uint64_t written; // the number of its last completed write
    _Atomic uint64_t max_ns;
    _Atomic uint64_t histogram[BUCKETS];
};

static struct {
    uint64_t seed, rate, zero;
    uint32_t threads, disks;
    struct disk disk[MAX_DISKS];
    struct thread *thread; // `threads` of them
    bool started;          // `start` was accepted: there is something to resume
    bool running;
    _Atomic bool stopping;
} run;

static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t error_count;
static char first_error[256];

// The counts at the last reset. Threads only ever add to theirs, so a reset costs them nothing.
static uint64_t baseline[BUCKETS];
static uint64_t stats_since;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NANOS + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t when) {
    struct timespec t = {.tv_sec = (time_t)(when / NANOS), .tv_nsec = (long)(when % NANOS)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {
    }
}

// ---- What is written -------------------------------------------------------------------------------------------

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

struct plan {
    uint32_t disk;
    uint64_t a, offset, length;
    bool zero;
};

static struct plan plan_write(uint32_t thread, uint64_t n) {
    struct plan p;
    p.disk = (uint32_t)((n - 1) % run.disks);
    uint64_t size = run.disk[p.disk].bytes;
    uint64_t region = size / run.threads / 4096 * 4096;
    uint64_t start = thread * region;
    uint64_t end = thread == run.threads - 1 ? size / SECTOR * SECTOR : start + region;
    p.a = mix(run.seed ^ mix((uint64_t)thread << 32) ^ mix(n));
    uint64_t b = mix(p.a), c = mix(b);
    uint64_t unit = p.a % 8 == 0 ? SECTOR : 4096;
    uint64_t slots = (end - start) / unit; // at least 1: `start` refuses smaller disks
    p.offset = start + c % slots * unit;
    p.length = unit * (1 + b % 8);
    if (p.length > end - p.offset) {
        p.length = (end - p.offset) / SECTOR * SECTOR;
    }
    p.zero = (p.a >> 32) % 100 < run.zero;
    return p;
}

// Stores a little-endian integer; memcpy because the spec's layout, not C's, decides (x86 is little-endian).
static void put32(unsigned char *at, uint32_t v) { memcpy(at, &v, sizeof v); }
static void put64(unsigned char *at, uint64_t v) { memcpy(at, &v, sizeof v); }

static void fill(unsigned char *buffer, const struct plan *p, uint32_t thread, uint64_t n) {
    for (uint64_t at = 0; at < p->length; at += SECTOR) {
        unsigned char *s = buffer + at;
        uint64_t o = p->offset + at;
        memcpy(s, "VFWRITE1", 8);
        put32(s + 8, thread);
        put32(s + 12, p->disk);
        put64(s + 16, n);
        put64(s + 24, o);
        for (uint64_t i = 0; i < 28; i++) {
            put64(s + 32 + 8 * i, mix(p->a ^ o ^ i));
        }
        memset(s + 256, (int)(n % 251 + 1), 256);
    }
}

// ---- Disks -----------------------------------------------------------------------------------------------------

// Reads a small sysfs file; the number of bytes read, or -1.
static ssize_t read_file(const char *path, char *to, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }
    ssize_t got = read(fd, to, size);
    close(fd);
    return got;
}

// Copies the printable middle of a serial: drives pad theirs with blanks on either side.
static void trim(char *to, size_t size, const char *from, size_t length) {
    while (length > 0 && (unsigned char)from[0] <= ' ') {
        from++, length--;
    }
    size_t n = 0;
    while (n < length && n + 1 < size && (unsigned char)from[n] > 0) {
        to[n] = from[n];
        n++;
    }
    while (n > 0 && (unsigned char)to[n - 1] <= ' ') {
        n--;
    }
    to[n] = 0;
}

static bool has_serial(const char *device, const char *serial) {
    char path[512], raw[512], found[256];
    // virtio-blk tells its serial itself.
    snprintf(path, sizeof path, "/sys/block/%s/serial", device);
    ssize_t got = read_file(path, raw, sizeof raw);
    if (got > 0) {
        trim(found, sizeof found, raw, (size_t)got);
        if (strcmp(found, serial) == 0) {
            return true;
        }
    }
    // SCSI and ATA have it in the vital product data page 0x80, behind a header of four bytes.
    snprintf(path, sizeof path, "/sys/block/%s/device/vpd_pg80", device);
    got = read_file(path, raw, sizeof raw);
    if (got > 4) {
        trim(found, sizeof found, raw + 4, (size_t)got - 4);
        if (strcmp(found, serial) == 0) {
            return true;
        }
    }
    // Last, the world-wide id of a disk without that page, which ends with the serial ("t10.ATA MODEL SERIAL").
    snprintf(path, sizeof path, "/sys/block/%s/device/wwid", device);
    got = read_file(path, raw, sizeof raw);
    if (got > 0) {
        trim(found, sizeof found, raw, (size_t)got);
        const char *last = strrchr(found, ' ');
        return last != NULL && strcmp(last + 1, serial) == 0;
    }
    return false;
}

// Opens the disk with this serial. On failure: -1, and the reason in `why`.
static int open_disk(const char *serial, int flags, uint64_t *bytes, char *why, size_t why_size) {
    DIR *dir = opendir("/sys/block");
    char path[300] = "";
    struct dirent *entry;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (entry->d_name[0] != '.' && has_serial(entry->d_name, serial)) {
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            break;
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    if (path[0] == 0) {
        snprintf(why, why_size, "no disk has serial %s", serial);
        return -1;
    }
    int fd = open(path, flags | O_CLOEXEC);
    int block = 0;
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, bytes) != 0 || ioctl(fd, BLKSSZGET, &block) != 0) {
        snprintf(why, why_size, "%s (serial %s): %s", path, serial, strerror(errno));
    } else if (block != SECTOR) {
        snprintf(why, why_size, "%s (serial %s): logical blocks of %d bytes, not %d", path, serial, block, SECTOR);
    } else {
        return fd;
    }
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

// 0 or an errno. One request to the kernel when all goes well; a short transfer goes on where it ended.
static int write_all(int fd, const unsigned char *data, uint64_t length, uint64_t offset) {
    while (length > 0) {
        ssize_t n = pwrite(fd, data, length, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? errno : EIO;
        }
        data += n, offset += (uint64_t)n, length -= (uint64_t)n;
    }
    return 0;
}

// A hole punch reaches QEMU as WRITE ZEROES with unmap (or WRITE SAME with UNMAP), the requests that a guest's file
// system makes. A disk that offers neither still has to read as zeroes afterwards: there the kernel writes them.
static int zero_range(int fd, uint64_t offset, uint64_t length) {
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r;
    do {
        r = fallocate(fd, mode, (off_t)offset, (off_t)length);
    } while (r != 0 && errno == EINTR);
    if (r == 0) {
        return 0;
    }
    if (errno != EOPNOTSUPP) {
        return errno;
    }
    uint64_t range[2] = {offset, length};
    do {
        r = ioctl(fd, BLKZEROOUT, range);
    } while (r != 0 && errno == EINTR);
    return r == 0 ? 0 : errno;
}

// ---- Threads ---------------------------------------------------------------------------------------------------

static uint32_t bucket_of(uint64_t ns) {
    if (ns < SUB) {
        return (uint32_t)ns;
    }
    uint32_t shift = 63 - (uint32_t)__builtin_clzll(ns) - SUB_BITS;
    return (shift + 1) * SUB + (uint32_t)((ns >> shift) - SUB);
}

static uint64_t bucket_middle(uint32_t bucket) {
    if (bucket < SUB) {
        return bucket;
    }
    uint32_t shift = bucket / SUB - 1;
    return ((uint64_t)(SUB + bucket % SUB) << shift) + ((1ull << shift) >> 1);
}

static void record_latency(struct thread *t, uint64_t ns) {
    atomic_fetch_add_explicit(&t->histogram[bucket_of(ns)], 1, memory_order_relaxed);
    uint64_t max = atomic_load(&t->max_ns);
    while (ns > max && !atomic_compare_exchange_weak(&t->max_ns, &max, ns)) {
    }
}

static void record_error(const struct plan *p, uint32_t thread, uint64_t n, int error) {
    pthread_mutex_lock(&error_lock);
    if (error_count++ == 0) {
        snprintf(first_error, sizeof first_error, "%s of write %" PRIu64 " of thread %" PRIu32 " at %" PRIu64 "+%" PRIu64
                 " of %.64s: %s", p->zero ? "zeroing" : "data", n, thread, p->offset, p->length,
                 run.disk[p->disk].serial, strerror(error));
    }
    pthread_mutex_unlock(&error_lock);
}

static void *writer_thread(void *argument) {
    struct thread *t = argument;
    uint64_t period = run.rate == 0 ? 0 : NANOS * run.threads / run.rate;
    // The threads take turns within a period instead of all writing at once.
    uint64_t turn = now_ns() + (run.threads ? period / run.threads * t->index : 0);
    while (!atomic_load(&run.stopping)) {
        if (period != 0) {
            uint64_t now = now_ns();
            if (now < turn) {
                // In steps, so that `stop` need not wait for the turn of a very slow rate.
                sleep_until(turn < now + RETRY_NS ? turn : now + RETRY_NS);
                continue;
            }
            turn = now - turn > LATE_NS ? now + period : turn + period;
        }
        uint64_t n = atomic_load(&t->written) + 1;
        struct plan p = plan_write(t->index, n);
        if (!p.zero) {
            fill(t->buffer, &p, t->index, n);
        }
        // A failed write is tried again until it succeeds: going on without it would break the order that the tests
        // rely on.
        for (;;) {
            uint64_t before = now_ns();
            int fd = run.disk[p.disk].fd;
            int error = p.zero ? zero_range(fd, p.offset, p.length) : write_all(fd, t->buffer, p.length, p.offset);
            if (error == 0) {
                record_latency(t, now_ns() - before);
                atomic_store(&t->written, n);
                break;
            }
            record_error(&p, t->index, n, error);
            if (atomic_load(&run.stopping)) {
                return NULL;
            }
            sleep_until(now_ns() + RETRY_NS);
        }
    }
    return NULL;
}

static const char *start_threads(void) {
    atomic_store(&run.stopping, false);
    for (uint32_t i = 0; i < run.threads; i++) {
        if (pthread_create(&run.thread[i].id, NULL, writer_thread, &run.thread[i]) != 0) {
            atomic_store(&run.stopping, true);
            while (i-- > 0) {
                pthread_join(run.thread[i].id, NULL);
            }
            return "cannot create a thread";
        }
    }
    run.running = true;
    return NULL;
}

static void stop_threads(void) {
    if (run.running) {
        atomic_store(&run.stopping, true);
        for (uint32_t i = 0; i < run.threads; i++) {
            pthread_join(run.thread[i].id, NULL);
        }
        run.running = false;
    }
}

// Forgets the run before: its disks may be unplugged now.
static void forget_run(void) {
    for (uint32_t i = 0; i < run.disks; i++) {
        close(run.disk[i].fd);
    }
    for (uint32_t i = 0; run.thread != NULL && i < run.threads; i++) {
        free(run.thread[i].buffer);
    }
    free(run.thread);
    run.thread = NULL;
    run.disks = run.threads = 0;
    run.started = false;
}

static void reset_stats(void) {
    memset(baseline, 0, sizeof baseline);
    for (uint32_t i = 0; i < run.threads; i++) {
        atomic_store(&run.thread[i].max_ns, 0);
        for (uint32_t b = 0; b < BUCKETS; b++) {
            baseline[b] += atomic_load_explicit(&run.thread[i].histogram[b], memory_order_relaxed);
        }
    }
    stats_since = now_ns();
}

// ---- Answers ---------------------------------------------------------------------------------------------------

struct text {
    char *data;
    size_t length, size;
};

static void add(struct text *t, const char *format, ...) {
    for (;;) {
        va_list list;
        va_start(list, format);
        int n = vsnprintf(t->data + t->length, t->size - t->length, format, list);
        va_end(list);
        if (n >= 0 && (size_t)n < t->size - t->length) {
            t->length += (size_t)n;
            return;
        }
        t->size = t->size * 2 + 1024;
        t->data = realloc(t->data, t->size);
        if (t->data == NULL) {
            abort();
        }
    }
}

static void add_string(struct text *t, const char *s) {
    add(t, "\"");
    for (; *s != 0; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\') {
            add(t, "\\%c", c);
        } else if (c < ' ' || c > '~') {
            add(t, "\\u%04x", c);
        } else {
            add(t, "%c", c);
        }
    }
    add(t, "\"");
}

static void answer_error(struct text *out, const char *format, ...) {
    char why[512];
    va_list list;
    va_start(list, format);
    vsnprintf(why, sizeof why, format, list);
    va_end(list);
    add(out, "{\"error\":");
    add_string(out, why);
    add(out, "}");
}

static void answer_ok(struct text *out) { add(out, "{\"ok\":true}"); }

static void answer_status(struct text *out) {
    add(out, "{\"running\":%s,\"writes\":[", run.running ? "true" : "false");
    for (uint32_t i = 0; i < run.threads; i++) {
        add(out, "%s%" PRIu64, i ? "," : "", atomic_load(&run.thread[i].written));
    }
    pthread_mutex_lock(&error_lock);
    add(out, "],\"errors\":%" PRIu64 ",\"first_error\":", error_count);
    add_string(out, first_error);
    pthread_mutex_unlock(&error_lock);
    add(out, "}");
}

static void answer_stats(struct text *out) {
    static uint64_t counts[BUCKETS];
    uint64_t total = 0, max = 0;
    for (uint32_t b = 0; b < BUCKETS; b++) {
        uint64_t count = 0;
        for (uint32_t i = 0; i < run.threads; i++) {
            count += atomic_load_explicit(&run.thread[i].histogram[b], memory_order_relaxed);
        }
        counts[b] = count - baseline[b];
        total += counts[b];
    }
    for (uint32_t i = 0; i < run.threads; i++) {
        uint64_t m = atomic_load(&run.thread[i].max_ns);
        max = m > max ? m : max;
    }
    uint64_t quantile[2] = {0, 0}, seen = 0;
    // The 50th and the 99th of a hundred, counted from one.
    uint64_t rank[2] = {(total + 1) / 2, total - total / 100};
    for (uint32_t b = 0; b < BUCKETS && total > 0; b++) {
        for (int q = 0; q < 2; q++) {
            if (seen < rank[q] && seen + counts[b] >= rank[q]) {
                quantile[q] = bucket_middle(b) < max ? bucket_middle(b) : max;
            }
        }
        seen += counts[b];
    }
    double seconds = stats_since == 0 ? 0 : (double)(now_ns() - stats_since) / (double)NANOS;
    add(out, "{\"seconds\":%.6f,\"count\":%" PRIu64 ",\"p50_us\":%.3f,\"p99_us\":%.3f,\"max_us\":%.3f}", seconds, total,
        (double)quantile[0] / 1000, (double)quantile[1] / 1000, (double)max / 1000);
}

// ---- Commands --------------------------------------------------------------------------------------------------

// The arguments of a command, KEY=VALUE each. A key is taken when it is used: what is left over is a mistake of the
// caller and is refused, since a test that is misunderstood proves nothing.
#define MAX_ARGUMENTS 16
struct arguments {
    char *key[MAX_ARGUMENTS], *value[MAX_ARGUMENTS];
    int count;
    char problem[256];
};

static void parse_arguments(struct arguments *a, char **rest) {
    memset(a, 0, sizeof *a);
    char *word;
    while ((word = strtok_r(NULL, " \t", rest)) != NULL) {
        char *equals = strchr(word, '=');
        if (equals == NULL || a->count == MAX_ARGUMENTS) {
            snprintf(a->problem, sizeof a->problem, "not an argument: %.100s", word);
            return;
        }
        *equals = 0;
        a->key[a->count] = word;
        a->value[a->count++] = equals + 1;
    }
}

static char *take(struct arguments *a, const char *key) {
    for (int i = 0; i < a->count; i++) {
        if (a->key[i] != NULL && strcmp(a->key[i], key) == 0) {
            a->key[i] = NULL;
            return a->value[i];
        }
    }
    return NULL;
}

// An integer between the bounds; `otherwise` is used when there is none, unless that is NULL.
static uint64_t take_number(struct arguments *a, const char *key, const uint64_t *otherwise, uint64_t low, uint64_t high) {
    char *text = take(a, key), *end;
    if (text == NULL && otherwise != NULL) {
        return *otherwise;
    }
    errno = 0;
    uint64_t v = text == NULL ? 0 : strtoull(text, &end, 0);
    if (text == NULL || text[0] < '0' || text[0] > '9' || *end != 0 || errno != 0 || v < low || v > high) {
        snprintf(a->problem, sizeof a->problem, "%s must be a number from %" PRIu64 " to %" PRIu64, key, low, high);
        return low;
    }
    return v;
}

static char *take_word(struct arguments *a, const char *key) {
    char *v = take(a, key);
    if (v == NULL || *v == 0) {
        snprintf(a->problem, sizeof a->problem, "%s is missing", key);
        return "";
    }
    return v;
}

static bool refused(struct arguments *a, struct text *out) {
    for (int i = 0; i < a->count && a->problem[0] == 0; i++) {
        if (a->key[i] != NULL) {
            snprintf(a->problem, sizeof a->problem, "unknown argument %.100s", a->key[i]);
        }
    }
    if (a->problem[0] != 0) {
        answer_error(out, "%s", a->problem);
        return true;
    }
    return false;
}

static void command_start(struct arguments *a, struct text *out) {
    const uint64_t one = 1, none = 0;
    uint64_t seed = take_number(a, "seed", NULL, 0, UINT64_MAX);
    uint64_t threads = take_number(a, "threads", &one, 1, MAX_THREADS);
    uint64_t rate = take_number(a, "rate", &none, 0, NANOS);
    uint64_t zero = take_number(a, "zero", &none, 0, 100);
    char *disks = take_word(a, "disks");
    if (refused(a, out)) {
        return;
    }
    if (run.running) {
        answer_error(out, "already running: stop first");
        return;
    }
    forget_run();
    char *serial, *rest = disks, why[512];
    while ((serial = strsep(&rest, ",")) != NULL) {
        if (run.disks == MAX_DISKS) {
            answer_error(out, "more than %d disks", MAX_DISKS);
            goto fail;
        }
        struct disk *d = &run.disk[run.disks];
        // O_EXCL: refuses a disk that is mounted, and a disk that is named twice.
        d->fd = open_disk(serial, O_RDWR | O_DIRECT | O_EXCL, &d->bytes, why, sizeof why);
        if (d->fd < 0) {
            answer_error(out, "%s", why);
            goto fail;
        }
        run.disks++;
        snprintf(d->serial, sizeof d->serial, "%s", serial);
        if (d->bytes / threads < 4096) {
            answer_error(out, "%s is too small for %" PRIu64 " threads", serial, threads);
            goto fail;
        }
    }
    run.thread = calloc(threads, sizeof *run.thread);
    if (run.thread == NULL) {
        answer_error(out, "out of memory");
        goto fail;
    }
    run.threads = (uint32_t)threads;
    for (uint32_t i = 0; i < run.threads; i++) {
        run.thread[i].index = i;
        run.thread[i].buffer = aligned_alloc(ALIGN, MAX_WRITE);
        if (run.thread[i].buffer == NULL) {
            answer_error(out, "out of memory");
            goto fail;
        }
    }
    run.seed = seed, run.rate = rate, run.zero = zero;
    pthread_mutex_lock(&error_lock);
    error_count = 0;
    first_error[0] = 0;
    pthread_mutex_unlock(&error_lock);
    reset_stats();
    const char *problem = start_threads();
    if (problem != NULL) {
        answer_error(out, "%s", problem);
        goto fail;
    }
    run.started = true;
    answer_ok(out);
    return;
fail:
    forget_run();
}

static void command_read(struct arguments *a, struct text *out) {
    char *serial = take_word(a, "serial");
    uint64_t offset = take_number(a, "offset", NULL, 0, INT64_MAX);
    uint64_t length = take_number(a, "length", NULL, 0, INT64_MAX);
    char why[512];
    uint64_t bytes;
    if (refused(a, out)) {
        return;
    }
    int fd = open_disk(serial, O_RDONLY | O_DIRECT, &bytes, why, sizeof why);
    if (fd < 0) {
        answer_error(out, "%s", why);
        return;
    }
    if (offset % SECTOR != 0 || length % SECTOR != 0 || offset > bytes || length > bytes - offset) {
        answer_error(out, "not whole sectors within the %" PRIu64 " bytes of %s", bytes, serial);
        close(fd);
        return;
    }
    const uint64_t piece = 1 << 20;
    unsigned char *buffer = aligned_alloc(ALIGN, piece);
    uint64_t hash = 0xcbf29ce484222325u;
    int error = buffer == NULL ? ENOMEM : 0;
    while (error == 0 && length > 0) {
        ssize_t n = pread(fd, buffer, length < piece ? length : piece, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            error = n < 0 ? errno : EIO;
            break;
        }
        for (ssize_t i = 0; i < n; i++) {
            hash = (hash ^ buffer[i]) * 0x100000001b3u;
        }
        offset += (uint64_t)n, length -= (uint64_t)n;
    }
    free(buffer);
    close(fd);
    if (error != 0) {
        answer_error(out, "read at %" PRIu64 " of %s: %s", offset, serial, strerror(error));
    } else {
        add(out, "{\"fnv1a64\":\"%016" PRIx64 "\"}", hash);
    }
}

static void command_write(struct arguments *a, struct text *out, bool zero) {
    char *serial = take_word(a, "serial");
    uint64_t offset = take_number(a, "offset", NULL, 0, INT64_MAX);
    // Data is one write, so it needs one buffer; zeroes need none.
    uint64_t length = take_number(a, "length", NULL, SECTOR, zero ? INT64_MAX : 64 << 20);
    uint64_t byte = zero ? 0 : take_number(a, "byte", NULL, 0, 255);
    char why[512];
    uint64_t bytes;
    if (refused(a, out)) {
        return;
    }
    int fd = open_disk(serial, O_RDWR | O_DIRECT, &bytes, why, sizeof why);
    if (fd < 0) {
        answer_error(out, "%s", why);
        return;
    }
    int error = 0;
    if (offset % SECTOR != 0 || length % SECTOR != 0 || offset > bytes || length > bytes - offset) {
        error = EINVAL;
    } else if (zero) {
        error = zero_range(fd, offset, length);
    } else {
        unsigned char *buffer = aligned_alloc(ALIGN, (length + ALIGN - 1) / ALIGN * ALIGN);
        if (buffer == NULL) {
            error = ENOMEM;
        } else {
            memset(buffer, (int)byte, length);
            error = write_all(fd, buffer, length, offset);
            free(buffer);
        }
    }
    close(fd);
    if (error != 0) {
        answer_error(out, "%s at %" PRIu64 "+%" PRIu64 " of %s (%" PRIu64 " bytes): %s", zero ? "zero" : "write", offset,
                     length, serial, bytes, strerror(error));
    } else {
        answer_ok(out);
    }
}

static void command_size(struct arguments *a, struct text *out) {
    char *serial = take_word(a, "serial"), why[512];
    uint64_t bytes;
    if (refused(a, out)) {
        return;
    }
    int fd = open_disk(serial, O_RDONLY, &bytes, why, sizeof why);
    if (fd < 0) {
        answer_error(out, "%s", why);
        return;
    }
    close(fd);
    add(out, "{\"bytes\":%" PRIu64 "}", bytes);
}

static void command(char *line, struct text *out) {
    char *rest, *name = strtok_r(line, " \t", &rest);
    struct arguments a;
    if (name == NULL) {
        answer_error(out, "empty command");
        return;
    }
    if (strcmp(name, "stats") == 0) {
        char *what = strtok_r(NULL, " \t", &rest);
        if (what == NULL) {
            answer_stats(out);
        } else if (strcmp(what, "reset") == 0) {
            reset_stats();
            answer_ok(out);
        } else {
            answer_error(out, "unknown argument %.100s", what);
        }
        return;
    }
    parse_arguments(&a, &rest);
    if (strcmp(name, "start") == 0) {
        command_start(&a, out);
    } else if (strcmp(name, "read") == 0) {
        command_read(&a, out);
    } else if (strcmp(name, "write") == 0) {
        command_write(&a, out, false);
    } else if (strcmp(name, "zero") == 0) {
        command_write(&a, out, true);
    } else if (strcmp(name, "size") == 0) {
        command_size(&a, out);
    } else if (refused(&a, out)) {
        // The commands below take no arguments.
    } else if (strcmp(name, "ping") == 0) {
        answer_ok(out);
    } else if (strcmp(name, "status") == 0) {
        answer_status(out);
    } else if (strcmp(name, "stop") == 0) {
        stop_threads();
        answer_status(out);
    } else if (strcmp(name, "resume") == 0) {
        const char *problem = run.running ? "already running" : !run.started ? "nothing to resume" : start_threads();
        if (problem != NULL) {
            answer_error(out, "%s", problem);
        } else {
            answer_ok(out);
        }
    } else {
        answer_error(out, "unknown command %.100s", name);
    }
}

// ---- The port --------------------------------------------------------------------------------------------------

static int open_port(const char *wanted) {
    for (;;) {
        DIR *dir = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        while (dir != NULL && (entry = readdir(dir)) != NULL) {
            char path[300], raw[128], name[128];
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            ssize_t got = read_file(path, raw, sizeof raw);
            if (got <= 0) {
                continue;
            }
            trim(name, sizeof name, raw, (size_t)got);
            if (strcmp(name, wanted) == 0) {
                snprintf(path, sizeof path, "/dev/%s", entry->d_name);
                int fd = open(path, O_RDWR | O_CLOEXEC);
                if (fd >= 0) {
                    closedir(dir);
                    return fd;
                }
            }
        }
        if (dir != NULL) {
            closedir(dir);
        }
        // The port may be plugged in later, or its driver still be at work.
        sleep_until(now_ns() + NANOS / 10);
    }
}

// Whether a host is at the other end. Without one a write would block, and its answer reach whoever comes next.
static bool host_there(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) >= 0 && !(p.revents & POLLHUP);
}

static void send_line(int fd, struct text *out) {
    add(out, "\n");
    size_t done = 0;
    while (done < out->length && host_there(fd)) {
        ssize_t n = write(fd, out->data + done, out->length - done);
        if (n < 0 && errno != EINTR) {
            break;
        }
        done += n > 0 ? (size_t)n : 0;
    }
    out->length = 0;
}

static void serve(const char *port) {
    static char line[1 << 16];
    size_t length = 0;
    bool overlong = false;
    struct text out = {0};
    int fd = open_port(port);
    while (!host_there(fd)) {
        sleep_until(now_ns() + NANOS / 20);
    }
    add(&out, "{\"event\":\"ready\"}");
    send_line(fd, &out);
    for (;;) {
        ssize_t n = read(fd, line + length, sizeof line - 1 - length);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            // The port was unplugged.
            close(fd);
            fd = open_port(port);
        }
        if (n <= 0) {
            // The host has closed its end: half a command of its is worth nothing to the next one.
            length = 0;
            overlong = false;
            sleep_until(now_ns() + NANOS / 50);
            continue;
        }
        length += (size_t)n;
        char *begin = line, *end;
        while ((end = memchr(begin, '\n', length - (size_t)(begin - line))) != NULL) {
            *end = 0;
            if (end > begin && end[-1] == '\r') {
                end[-1] = 0;
            }
            if (overlong) {
                overlong = false;
                answer_error(&out, "the command is too long");
            } else {
                command(begin, &out);
            }
            send_line(fd, &out);
            begin = end + 1;
        }
        length -= (size_t)(begin - line);
        memmove(line, begin, length);
        if (length == sizeof line - 1) {
            overlong = true;
            length = 0;
        }
    }
}

// Returns when the power button was pressed. Part of this program because nothing else in the guest needs the input
// events: it saves a daemon with a configuration.
static void await_power_button(void) {
    struct pollfd devices[32];
    nfds_t count = 0;
    while (count == 0) {
        for (int i = 0; i < 32; i++) {
            char path[64];
            snprintf(path, sizeof path, "/dev/input/event%d", i);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd >= 0) {
                devices[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
            }
        }
        if (count == 0) {
            sleep_until(now_ns() + NANOS / 5);
        }
    }
    for (;;) {
        if (poll(devices, count, -1) < 0) {
            continue;
        }
        for (nfds_t i = 0; i < count; i++) {
            struct input_event event;
            if (!(devices[i].revents & POLLIN)) {
                continue;
            }
            if (read(devices[i].fd, &event, sizeof event) == sizeof event && event.type == EV_KEY &&
                event.code == KEY_POWER && event.value == 1) {
                return;
            }
        }
    }
}

// For init, which has the same question before the writer runs: the device with this serial, if there is one.
static int print_device(const char *serial) {
    DIR *dir = opendir("/sys/block");
    struct dirent *entry;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (entry->d_name[0] != '.' && has_serial(entry->d_name, serial)) {
            printf("/dev/%s\n", entry->d_name);
            return 0;
        }
    }
    return 1;
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--port") == 0) {
        serve(argv[2]);
    } else if (argc == 2 && strcmp(argv[1], "--await-power-button") == 0) {
        await_power_button();
        return 0;
    } else if (argc == 3 && strcmp(argv[1], "--device") == 0) {
        return print_device(argv[2]);
    }
    fprintf(stderr, "usage: writer --port NAME | --await-power-button | --device SERIAL\n");
    return 2;
}
