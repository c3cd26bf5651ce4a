// A pool of threads for short jobs on a shared machine: the caller works on the job itself and waits only for workers
// that are inside it. A worker that the system has not scheduled yet costs nothing.
#ifndef AAAC_POOL_H
#define AAAC_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#if defined(__x86_64__)
#define pause_cpu() __builtin_ia32_pause()
#else
#define pause_cpu() ((void)0)
#endif

typedef void (*Task)(void *job, int64_t index);

// Tasks are taken in runs, about SHARES for each thread: neighbours lie next to each other in memory, where the next is
// asked for while the last is worked on.
enum { MAX_WORKERS = 255, SPINS = 2000, SHARES = 8 };

static struct {
    pthread_mutex_t owner; // held by the caller whose job it is
    pthread_mutex_t lock;  // guards `generation` for those that sleep
    pthread_cond_t wake;
    _Atomic uint32_t generation;
    _Atomic int open, inside, seats, sleepers;
    _Atomic int64_t next;
    int64_t count, run;
    Task task;
    void *job;
    int workers;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void pool_drain(void) {
    int64_t first;
    while ((first = atomic_fetch_add(&pool.next, pool.run)) < pool.count)
        for (int64_t index = first; index < first + pool.run && index < pool.count; index++) pool.task(pool.job, index);
}

static void *pool_worker(void *unused) {
    uint32_t seen = 0;
    (void)unused;
    for (;;) {
        for (int spin = 0; atomic_load(&pool.generation) == seen && spin < SPINS; spin++) pause_cpu();
        if (atomic_load(&pool.generation) == seen) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.generation);
        // enter before looking whether the job is still open: the caller closes it before it counts who is inside
        atomic_fetch_add(&pool.inside, 1);
        if (atomic_load(&pool.open) && atomic_fetch_sub(&pool.seats, 1) > 0) pool_drain();
        atomic_fetch_sub(&pool.inside, 1);
    }
    return NULL;
}

// A forked child has none of the workers; whoever held a lock does not exist there.
static void pool_after_fork(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleepers, 0);
    pool.workers = 0;
}

__attribute__((constructor)) static void pool_set_up(void) { pthread_atfork(NULL, NULL, pool_after_fork); }

static void pool_grow(int workers) {
    for (; pool.workers < workers && pool.workers < MAX_WORKERS; pool.workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_worker, NULL) != 0) return;
        pthread_detach(thread);
    }
}

// Run task(job, 0 .. count - 1) on up to `threads` threads. While another caller has the pool, the caller works alone.
static void pool_run(int threads, int64_t count, Task task, void *job) {
    if (threads > count) threads = (int)count;
    if (threads < 2 || pthread_mutex_trylock(&pool.owner) != 0) {
        for (int64_t index = 0; index < count; index++) task(job, index);
        return;
    }
    pool_grow(threads - 1);
    pool.count = count;
    pool.run = count / (threads * SHARES) > 1 ? count / (threads * SHARES) : 1;
    pool.task = task;
    pool.job = job;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.seats, threads - 1);
    atomic_store(&pool.open, 1);
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.generation, 1);
    pthread_mutex_unlock(&pool.lock);
    if (atomic_load(&pool.sleepers)) pthread_cond_broadcast(&pool.wake);
    pool_drain();
    atomic_store(&pool.open, 0);
    for (int spin = 0; atomic_load(&pool.inside); spin++) {
        if (spin < SPINS)
            pause_cpu();
        else
            sched_yield();
    }
    pthread_mutex_unlock(&pool.owner);
}

#endif
