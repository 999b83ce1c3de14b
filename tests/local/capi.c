/* What programs do to a library: threads, forks, several instances, dlopen and dlclose, an end without an end. Each scene
 * prints what is true of it; the guest is this machine. */
#include "libvmi.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static vmi_instance_t opened(uint64_t flags)
{
    vmi_instance_t vmi = NULL;
    vmi_init_error_t error = 0;
    char domain[] = "any";
    if (vmi_init_complete(&vmi, domain, VMI_INIT_DOMAINNAME | flags, NULL, VMI_CONFIG_GLOBAL_FILE_ENTRY, NULL, &error)) {
        printf("failure, error %d\n", error);
        exit(3);
    }
    return vmi;
}

/* How many tasks the guest lists; -1 if a read failed. */
static int tasks(vmi_instance_t vmi, int wanted, int *found)
{
    addr_t tasks, pids, head, at;
    int count = 0;
    if (vmi_get_offset(vmi, "linux_tasks", &tasks) || vmi_get_offset(vmi, "linux_pid", &pids) ||
        vmi_translate_ksym2v(vmi, "init_task", &head))
        return -1;
    at = head += tasks;
    do {
        uint32_t pid;
        if (vmi_read_32_va(vmi, at - tasks + pids, 0, &pid))
            return -1;
        *found |= (int)pid == wanted;
        count++;
        if (vmi_read_addr_va(vmi, at, 0, &at))
            return -1;
    } while (at != head);
    return count;
}

static int lists_itself(vmi_instance_t vmi)
{
    int found = 0;
    return tasks(vmi, getpid(), &found) > 1 && found;
}

static void *many_listings(void *vmi)
{
    long good = 0;
    for (int i = 0; i < 50; i++)
        good += lists_itself(vmi);
    return (void *)good;
}

static void threads(void)
{
    vmi_instance_t vmi = opened(0);
    pthread_t all[4];
    long good = 0;
    for (int i = 0; i < 4; i++)
        pthread_create(&all[i], NULL, many_listings, vmi);
    for (int i = 0; i < 4; i++) {
        void *found;
        pthread_join(all[i], &found);
        good += (long)found;
    }
    printf("%ld of 200 listings\n", good);
    vmi_destroy(vmi);
}

/* A child of each kind reads by itself; the parent goes on. */
static void forks(void)
{
    vmi_instance_t vmi = opened(0);
    for (int held = 0; held < 2; held++) {
        if (held)
            vmi_pause_vm(vmi);
        int found = 0;
        tasks(vmi, 1, &found);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            int seen = 0;
            /* In a hold the child sees what its parent saw. */
            _exit(tasks(vmi, 1, &seen) > 1 && seen && (held || lists_itself(vmi)) ? 42 : 1);
        }
        int status = 0;
        waitpid(child, &status, 0);
        printf("%s: child %d, parent %d\n", held ? "held" : "free", WEXITSTATUS(status),
               tasks(vmi, 1, &found) > 1);
        if (held)
            vmi_resume_vm(vmi);
    }
    vmi_destroy(vmi);
}

static void instances(void)
{
    vmi_instance_t all[5];
    int good = 0;
    for (int i = 0; i < 5; i++)
        all[i] = opened(0);
    for (int i = 0; i < 5; i++)
        good += lists_itself(all[i]);
    for (int i = 4; i >= 0; i--)
        vmi_destroy(all[i]);
    printf("%d of 5 instances\n", good);
}

static void many(void)
{
    int good = 0;
    for (int i = 0; i < 20; i++) {
        vmi_instance_t vmi = opened(0);
        good += lists_itself(vmi);
        vmi_destroy(vmi);
    }
    printf("%d of 20 instances, one after the other\n", good);
}

static void events(void)
{
    vmi_instance_t vmi = opened(VMI_INIT_EVENTS);
    uint64_t event[16] = {9};
    int pending = vmi_are_events_pending(vmi), listened = vmi_events_listen(vmi, 1);
    printf("%d %d %d\n", pending, listened, vmi_register_event(vmi, (void *)event));
    vmi_destroy(vmi);
}

/* The other ABI's contexts, by either. */
static void contexts(void)
{
    vmi_instance_t vmi = opened(0);
    addr_t task, value = 0;
    vmi_translate_ksym2v(vmi, "init_task", &task);
    access_context_t now = {.version = ACCESS_CONTEXT_VERSION, .tm = VMI_TM_PROCESS_PID, .addr = task};
    struct {
        access_context_14_t context;
        uint64_t behind;
    } old = {{.tm = VMI_TM_PROCESS_PID_14, .addr = task}, 0};
    printf("0.15: %d, ", vmi_read_64(vmi, &now, &value));
    printf("0.14: %d, ", vmi_read_64(vmi, (void *)&old, &value));
    access_context_14_t symbol = {.tm = VMI_TM_KERNEL_SYMBOL_14, .ksym = "init_task"};
    old.context = symbol;
    printf("symbol: %d, ", vmi_read_64(vmi, (void *)&old, &value));
    printf("mode %u\n", vmi_get_page_mode(vmi, 0));
    vmi_destroy(vmi);
}

/* A profile in JSON by the program's json-c. */
static void json(const char *path)
{
    vmi_instance_t vmi = NULL;
    char domain[] = "any";
    if (vmi_init_complete(&vmi, domain, VMI_INIT_DOMAINNAME, NULL, VMI_CONFIG_JSON_PATH, (void *)path, NULL)) {
        printf("failure\n");
        return;
    }
    void *library = dlopen("libjson-c.so.5", RTLD_NOW);
    json_object *(*parse)(const char *) = library ? dlsym(library, "json_object_from_file") : NULL;
    int (*put)(json_object *) = library ? dlsym(library, "json_object_put") : NULL;
    json_object *own = vmi_get_kernel_json(vmi), *given = parse ? parse(path) : NULL;
    for (int i = 0; i < 2; i++) {
        addr_t symbol = 0, offset = 0, field = 0;
        size_t size = 0, first = 0, last = 0;
        const char *type = "none";
        json_object *from = i ? given : own;
        vmi_get_symbol_addr_from_json(vmi, from, "made_up", &symbol);
        vmi_get_struct_size_from_json(vmi, from, "flags", &size);
        vmi_get_struct_member_offset_from_json(vmi, from, "flags", "low", &offset);
        vmi_get_bitfield_offset_and_size_from_json(vmi, from, "flags", "few", &field, &first, &last);
        vmi_get_struct_field_type_name_from_json(vmi, from, "flags", "low", &type);
        printf("%#" PRIx64 " %zu %" PRIu64 " %" PRIu64 " %zu %zu %s %d\n", symbol, size, offset, field, first, last, type,
               vmi_get_struct_size_from_json(vmi, from, "none", &size));
    }
    printf("%s\n", strcmp(vmi_get_rekall_path(vmi), path) ? "another path" : "its path");
    vmi_destroy(vmi);
    if (put)
        put(given);
}

/* Reads until the guest is gone, and then once more: neither zeros nor old bytes, but a failure. */
static void until_gone(void)
{
    vmi_instance_t vmi = opened(0);
    addr_t task;
    uint64_t value;
    vmi_translate_ksym2v(vmi, "init_task", &task);
    printf("reading\n");
    fflush(stdout);
    status_t status;
    do {
        value = 0xa5a5;
        vmi_pagecache_flush(vmi);
        status = vmi_read_64_va(vmi, task, 0, &value);
    } while (status == VMI_SUCCESS);
    printf("failure, %#" PRIx64 "\n", value);
    vmi_destroy(vmi);
}

/* As a plugin loads it: for itself alone, and gone again. Linked against nothing of ours. */
static void loads(const char *path)
{
    for (int i = 0; i < 3; i++) {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) {
            printf("%s\n", dlerror());
            return;
        }
        status_t (*init)(vmi_instance_t *, const void *, uint64_t, vmi_init_data_t *, vmi_config_t, void *,
                         vmi_init_error_t *) = dlsym(library, "vmi_init_complete");
        status_t (*read)(vmi_instance_t, const char *, uint64_t *) = dlsym(library, "vmi_read_64_ksym");
        status_t (*destroy)(vmi_instance_t) = dlsym(library, "vmi_destroy");
        vmi_instance_t vmi = NULL;
        uint64_t value = 0xa5a5;
        char domain[] = "any";
        status_t made = init(&vmi, domain, VMI_INIT_DOMAINNAME, NULL, VMI_CONFIG_GLOBAL_FILE_ENTRY, NULL, NULL);
        status_t came = read(vmi, "init_task", &value);
        printf("%d %d %d\n", made, came, value != 0xa5a5);
        destroy(vmi);
        dlclose(library);
    }
}

int main(int argc, char **argv)
{
    const char *scene = argc > 1 ? argv[1] : "";
    if (!strcmp(scene, "threads"))
        threads();
    else if (!strcmp(scene, "forks"))
        forks();
    else if (!strcmp(scene, "instances"))
        instances();
    else if (!strcmp(scene, "many"))
        many();
    else if (!strcmp(scene, "events"))
        events();
    else if (!strcmp(scene, "contexts"))
        contexts();
    else if (!strcmp(scene, "json"))
        json(argv[2]);
    else if (!strcmp(scene, "gone"))
        until_gone();
    else if (!strcmp(scene, "loads"))
        loads(argv[2]);
    else if (!strcmp(scene, "exit")) {
        vmi_instance_t vmi = opened(0);
        vmi_pause_vm(vmi);
        printf("%d\n", lists_itself(vmi));
        exit(5);
    } else if (!strcmp(scene, "signal")) {
        lists_itself(opened(0));
        raise(SIGINT);
        printf("still here\n");
    } else
        return 2;
    return 0;
}
