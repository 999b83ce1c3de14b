/* LibVMI's C library over vmishim: each function asks vmishim.capi, in Python, except that memory which the read-ahead
 * knows is answered here, from the dictionaries that vmishim.guests.target describes.
 *
 * What cannot be done fails as LibVMI's file driver fails: with the same status, and its out-parameters as they were.
 */
#define _GNU_SOURCE
#include "libvmi.h"
#include "python.h"

#include <ctype.h>
#include <dlfcn.h>
#include <iconv.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct vmi_instance {
    PyObject *guest;         /* vmishim.capi.Guest */
    PyObject *words, *cells; /* what is known of kernel memory, see vmishim.guests.target */
    PyObject *key;           /* of a look-up in them, see at_address */
    PyObject *strings;       /* those that were handed out, which live as long as the instance */
    PyObject *profiles;      /* JSON objects that were handed in: their addresses */
    json_object *json;       /* of the JSON profile in use */
    vmi_mode_t mode;
    bool abi_14, events, warned, faulted;
    uint8_t width; /* bytes of an address, 0 before paging is known */
    access_context_t fault;
};

/* ---- calls into Python, with the GIL ------------------------------------------------------------------------------ */

/* The result of a method of the guest. NULL if it raised, which the guest has then told. */
static PyObject *ask(vmi_instance_t vmi, const char *method, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    PyObject *arguments = Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *call = arguments ? PyObject_GetAttrString(vmi->guest, method) : NULL;
    PyObject *result = call ? PyObject_CallObject(call, arguments) : NULL;
    Py_XDECREF(call);
    Py_XDECREF(arguments);
    if (result == NULL) {
        PyObject *kind, *value, *trace;
        PyErr_Fetch(&kind, &value, &trace);
        PyErr_NormalizeException(&kind, &value, &trace);
        Py_XDECREF(PyObject_CallMethod(vmi->guest, "failed", "O", value ? value : Py_None));
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        PyErr_Clear();
    }
    return result;
}

/* A number that a method returned. */
static bool number(PyObject *result, uint64_t *value)
{
    if (result == NULL)
        return false;
    bool is_number = PyLong_Check(result);
    if (is_number)
        *value = PyLong_AsUnsignedLongLongMask(result);
    Py_DECREF(result);
    return is_number;
}

static bool done(PyObject *result)
{
    Py_XDECREF(result);
    return result != NULL;
}

/* Text from the program: UTF-8, or bytes that Python gives back as they are. */
static PyObject *text(const char *string)
{
    return PyUnicode_DecodeUTF8(string, strlen(string), "surrogateescape");
}

/* `ask` for a number, with the GIL taken and left again. */
#define NUMBER(VMI, VALUE, ...)                                                                                        \
    ({                                                                                                                 \
        bool taken_ = python_enter();                                                                                  \
        bool found_ = number(ask(VMI, __VA_ARGS__), VALUE);                                                            \
        python_leave(taken_);                                                                                          \
        found_;                                                                                                        \
    })
#define DO(VMI, ...)                                                                                                   \
    ({                                                                                                                 \
        bool taken_ = python_enter();                                                                                  \
        bool done_ = done(ask(VMI, __VA_ARGS__));                                                                      \
        python_leave(taken_);                                                                                          \
        done_;                                                                                                         \
    })

/* Bytes that a method returned, as a C string that lives as long as the instance; NULL for None. */
static const char *keep(vmi_instance_t vmi, PyObject *result)
{
    const char *string = NULL;
    if (result != NULL && PyBytes_Check(result)) {
        PyObject *kept = PyDict_SetDefault(vmi->strings, result, result);
        string = kept ? PyBytes_AS_STRING(kept) : NULL;
    }
    Py_XDECREF(result);
    return string;
}

#define STRING(VMI, ...)                                                                                               \
    ({                                                                                                                 \
        bool taken_ = python_enter();                                                                                  \
        const char *string_ = keep(VMI, ask(VMI, __VA_ARGS__));                                                        \
        python_leave(taken_);                                                                                          \
        string_;                                                                                                       \
    })

/* ---- libraries of the program ------------------------------------------------------------------------------------- */

struct library {
    const char *prefix, *name, *path;
};

static int is_loaded(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    struct library *library = data;
    const char *base = strrchr(info->dlpi_name, '/');
    base = base ? base + 1 : info->dlpi_name;
    if (strncmp(base, library->prefix, strlen(library->prefix)))
        return 0;
    library->path = strdup(info->dlpi_name);
    return 1;
}

/* A function of a library: of the copy that the program has loaded, since what one copy allocates only it can free. */
static void *foreign(struct library library, const char *function)
{
    dl_iterate_phdr(is_loaded, &library);
    void *handle = dlopen(library.path ? library.path : library.name, RTLD_LAZY | RTLD_LOCAL);
    free((char *)library.path);
    void *found = handle ? dlsym(handle, function) : NULL;
    if (found == NULL)
        fprintf(stderr, "libvmi.so.0 of vmishim: %s is needed, and cannot be loaded\n", library.name);
    return found;
}

static const struct library GLIB = {"libglib-2", "libglib-2.0.so.0", NULL};
static const struct library JSON = {"libjson-c", "libjson-c.so.5", NULL};

/* ---- places in the guest ------------------------------------------------------------------------------------------ */

enum kind { PHYSICAL, TABLES, PROCESS, NOWHERE };

/* An address, and what it is relative to. `number` is the physical address of page tables, or a pid. */
struct place {
    enum kind kind;
    int64_t number;
    addr_t address;
};

/* Whether a context can only be of the other ABI, which it then says once. */
static bool is_foreign(vmi_instance_t vmi, const void *context)
{
    const access_context_t *now = context;
    const access_context_14_t *old = context;
    bool wrong;
    if (vmi->abi_14)
        wrong = old->tm < VMI_TM_NONE_14 || old->tm > VMI_TM_KERNEL_SYMBOL_14 ||
                (old->tm == VMI_TM_NONE_14 && !old->addr && !old->ksym && old->dtb - 1 < VMI_TM_KERNEL_SYMBOL);
    else
        wrong = now->version > ACCESS_CONTEXT_VERSION || now->pm > VMI_PM_EPT_5L || now->npm > VMI_PM_EPT_5L ||
                now->tm > VMI_TM_KERNEL_SYMBOL;
    if (wrong && !vmi->warned) {
        vmi->warned = true;
        fprintf(stderr,
                "libvmi.so.0 of vmishim: the program's access_context_t is not that of LibVMI %s: if it was compiled for "
                "LibVMI %s, start it by `vmishim run --abi %s`, or set VMISHIM_LIBVMI_ABI=%s\n",
                vmi->abi_14 ? "0.14" : "0.15", vmi->abi_14 ? "0.15" : "0.14", vmi->abi_14 ? "0.15" : "0.14",
                vmi->abi_14 ? "0.15" : "0.14");
    }
    return wrong;
}

static bool symbol_address(vmi_instance_t vmi, const char *symbol, addr_t *address)
{
    PyObject *name = text(symbol);
    return number(ask(vmi, "symbol", "(N)", name), address);
}

/* With the GIL. */
static struct place place_of(vmi_instance_t vmi, const access_context_t *ctx)
{
    struct place nowhere = {NOWHERE, 0, 0};
    if (is_foreign(vmi, ctx))
        return nowhere;
    uint32_t mechanism = ctx->tm;
    addr_t address = ctx->addr, tables = ctx->pt;
    vmi_pid_t pid = ctx->pid;
    const char *symbol = ctx->ksym;
    if (vmi->abi_14) {
        const access_context_14_t *old = (const void *)ctx;
        mechanism = old->tm - 1, address = old->addr, tables = old->dtb, pid = old->pid, symbol = old->ksym;
    } else if (ctx->npt || ctx->npm || (ctx->pm && ctx->pm != VMI_PM_IA32E))
        return nowhere; /* nested page tables are the hypervisor's, and other modes are not the guest's */
    switch (mechanism) {
    case VMI_TM_NONE:
        return (struct place){PHYSICAL, 0, address};
    case VMI_TM_PROCESS_DTB:
        return (struct place){TABLES, (int64_t)tables, address};
    case VMI_TM_PROCESS_PID:
        return (struct place){PROCESS, pid, address};
    default:
        return symbol && symbol_address(vmi, symbol, &address) ? (struct place){PROCESS, 0, address} : nowhere;
    }
}

/* A context `further` bytes on, of the same ABI. */
access_context_t context_at(vmi_instance_t vmi, const access_context_t *ctx, addr_t further)
{
    access_context_t copy;
    memcpy(&copy, ctx, vmi->abi_14 ? sizeof(access_context_14_t) : sizeof copy);
    *(vmi->abi_14 ? &((access_context_14_t *)(void *)&copy)->addr : &copy.addr) += further;
    return copy;
}

/* ---- reads -------------------------------------------------------------------------------------------------------- */

/* What an int object holds, without a call: a third of the time of a read. The layout is that of CPython's longintrepr.h. */
#if PY_VERSION_HEX >= 0x030C0000
#define DIGITS(OBJECT) (((PyLongObject *)(OBJECT))->long_value.ob_digit)
#define DIGIT_COUNT(OBJECT) ((Py_ssize_t)(((PyLongObject *)(OBJECT))->long_value.lv_tag >> 3))
#else
#define DIGITS(OBJECT) (((PyLongObject *)(OBJECT))->ob_digit)
#define DIGIT_COUNT(OBJECT) Py_SIZE(OBJECT)
#endif
_Static_assert(PYLONG_BITS_IN_DIGIT == 30, "an address has three digits");
enum { DIGIT = (1 << 30) - 1 };

static inline uint64_t value_of(PyObject *number)
{
    uint64_t value = 0;
    for (Py_ssize_t at = DIGIT_COUNT(number); at-- > 0;)
        value = value << 30 | DIGITS(number)[at];
    return value;
}

/* What a dictionary has at an address of the kernel, all of which need three digits. The key is only looked up, so nothing
 * keeps it: one object serves all look-ups, changed under the GIL. */
static inline PyObject *at_address(vmi_instance_t vmi, PyObject *dictionary, addr_t address)
{
    if (address >> 60 == 0)
        return NULL;
    DIGITS(vmi->key)[0] = address & DIGIT;
    DIGITS(vmi->key)[1] = address >> 30 & DIGIT;
    DIGITS(vmi->key)[2] = address >> 60;
    return PyDict_GetItemWithError(dictionary, vmi->key);
}

/* Kernel memory that is known right now. */
static inline bool known(vmi_instance_t vmi, addr_t address, size_t count, void *buffer)
{
    PyObject *found;
    if (count == 8 && (found = at_address(vmi, vmi->words, address)) != NULL) {
        uint64_t word = value_of(found);
        memcpy(buffer, &word, sizeof word);
        return true;
    }
    if ((found = at_address(vmi, vmi->cells, address)) == NULL || (size_t)PyBytes_GET_SIZE(found) < count)
        return false;
    memcpy(buffer, PyBytes_AS_STRING(found), count);
    return true;
}

/* After a call that translated: what did not translate, for vmi_get_last_pagetable_lookup_fault. */
static void note_fault(vmi_instance_t vmi)
{
    PyObject *fault = PyObject_GetAttrString(vmi->guest, "fault");
    vmi->faulted = fault != NULL && PyTuple_Check(fault);
    if (vmi->faulted)
        vmi->fault = (access_context_t){
            .version = ACCESS_CONTEXT_VERSION,
            .pm = VMI_PM_IA32E,
            .tm = VMI_TM_PROCESS_DTB,
            .addr = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(fault, 0)),
            .pt = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(fault, 1)),
        };
    Py_XDECREF(fault);
    PyErr_Clear();
}

static status_t read_asked(vmi_instance_t vmi, struct place at, size_t count, void *buffer, size_t *bytes_read)
{
    size_t came = 0;
    bool whole = false;
    PyObject *data = at.kind == NOWHERE
                         ? NULL
                         : ask(vmi, "read", "(iLKn)", at.kind, (long long)at.number, (unsigned long long)at.address,
                               count > PY_SSIZE_T_MAX ? PY_SSIZE_T_MAX : (Py_ssize_t)count);
    if (data != NULL && PyBytes_Check(data)) {
        came = PyBytes_GET_SIZE(data);
        whole = came == count;
        memcpy(buffer, PyBytes_AS_STRING(data), came < count ? came : count);
    }
    Py_XDECREF(data);
    if (at.kind == TABLES || at.kind == PROCESS)
        note_fault(vmi);
    if (bytes_read)
        *bytes_read = came;
    return whole ? VMI_SUCCESS : VMI_FAILURE;
}

static inline status_t read_at(vmi_instance_t vmi, struct place at, size_t count, void *buffer, size_t *bytes_read)
{
    if (bytes_read)
        *bytes_read = 0;
    if (vmi == NULL || buffer == NULL)
        return VMI_FAILURE;
    bool taken = python_enter();
    status_t status;
    if (at.kind == PROCESS && at.number == 0 && known(vmi, at.address, count, buffer)) {
        status = VMI_SUCCESS;
        if (bytes_read)
            *bytes_read = count;
    } else
        status = read_asked(vmi, at, count, buffer, bytes_read);
    python_leave(taken);
    return status;
}

status_t vmi_read(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *bytes_read)
{
    if (bytes_read)
        *bytes_read = 0;
    if (vmi == NULL || ctx == NULL || buf == NULL)
        return VMI_FAILURE;
    bool taken = python_enter();
    status_t status = read_at(vmi, place_of(vmi, ctx), count, buf, bytes_read);
    python_leave(taken);
    return status;
}

status_t vmi_read_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, size_t count, void *buf, size_t *bytes_read)
{
    return read_at(vmi, (struct place){PROCESS, pid, vaddr}, count, buf, bytes_read);
}

status_t vmi_read_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *bytes_read)
{
    return read_at(vmi, (struct place){PHYSICAL, 0, paddr}, count, buf, bytes_read);
}

status_t vmi_read_ksym(vmi_instance_t vmi, const char *sym, size_t count, void *buf, size_t *bytes_read)
{
    addr_t address;
    if (bytes_read)
        *bytes_read = 0;
    if (vmi == NULL || sym == NULL || buf == NULL)
        return VMI_FAILURE;
    bool taken = python_enter();
    status_t status = VMI_FAILURE;
    if (symbol_address(vmi, sym, &address))
        status = read_at(vmi, (struct place){PROCESS, 0, address}, count, buf, bytes_read);
    python_leave(taken);
    return status;
}

/* A pointer cannot be read before the width of addresses is known, which it is once paging is. */
static bool has_width(vmi_instance_t vmi)
{
    return vmi != NULL && vmi->width == 8;
}

#define ANY(VMI) true
#define READS(NAME, TYPE, FITS)                                                                                        \
    status_t vmi_read_##NAME(vmi_instance_t vmi, const access_context_t *ctx, TYPE *value)                             \
    {                                                                                                                  \
        return FITS(vmi) ? vmi_read(vmi, ctx, sizeof *value, value, NULL) : VMI_FAILURE;                               \
    }                                                                                                                  \
    status_t vmi_read_##NAME##_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, TYPE *value)                        \
    {                                                                                                                  \
        return read_at(vmi, (struct place){PROCESS, pid, vaddr}, sizeof *value, value, NULL);                          \
    }                                                                                                                  \
    status_t vmi_read_##NAME##_pa(vmi_instance_t vmi, addr_t paddr, TYPE *value)                                       \
    {                                                                                                                  \
        return FITS(vmi) ? vmi_read_pa(vmi, paddr, sizeof *value, value, NULL) : VMI_FAILURE;                          \
    }                                                                                                                  \
    status_t vmi_read_##NAME##_ksym(vmi_instance_t vmi, const char *sym, TYPE *value)                                  \
    {                                                                                                                  \
        return vmi_read_ksym(vmi, sym, sizeof *value, value, NULL);                                                    \
    }
READS(8, uint8_t, ANY)
READS(16, uint16_t, ANY)
READS(32, uint32_t, ANY)
READS(64, uint64_t, ANY)
READS(addr, addr_t, has_width)

/* Bytes with two NULs behind, for the caller to free. */
static void *copied(const char *bytes, size_t count)
{
    char *copy = malloc(count + 2);
    if (copy != NULL) {
        memcpy(copy, bytes, count);
        copy[count] = copy[count + 1] = 0;
    }
    return copy;
}

/* A string with an end of `wide` bytes. */
static void *string_at(vmi_instance_t vmi, struct place at, int wide)
{
    void *copy = NULL;
    if (vmi == NULL || at.kind == NOWHERE)
        return NULL;
    bool taken = python_enter();
    if (at.kind == PROCESS && at.number == 0 && wide == 1) {
        PyObject *cell = at_address(vmi, vmi->cells, at.address);
        if (cell != NULL) {
            const char *bytes = PyBytes_AS_STRING(cell);
            const char *end = memchr(bytes, 0, PyBytes_GET_SIZE(cell));
            if (end != NULL)
                copy = copied(bytes, end - bytes);
        }
    }
    if (copy == NULL) {
        PyObject *data = ask(vmi, "text", "(iLKi)", at.kind, (long long)at.number, (unsigned long long)at.address, wide);
        if (data != NULL && PyBytes_Check(data))
            copy = copied(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data));
        Py_XDECREF(data);
        if (at.kind != PHYSICAL)
            note_fault(vmi);
    }
    python_leave(taken);
    return copy;
}

static void *string_of(vmi_instance_t vmi, const access_context_t *ctx, int wide)
{
    if (vmi == NULL || ctx == NULL)
        return NULL;
    bool taken = python_enter();
    void *copy = string_at(vmi, place_of(vmi, ctx), wide);
    python_leave(taken);
    return copy;
}

char *vmi_read_str(vmi_instance_t vmi, const access_context_t *ctx)
{
    return string_of(vmi, ctx, 1);
}

char *vmi_read_str_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid)
{
    return string_at(vmi, (struct place){PROCESS, pid, vaddr}, 1);
}

char *vmi_read_str_pa(vmi_instance_t vmi, addr_t paddr)
{
    return string_at(vmi, (struct place){PHYSICAL, 0, paddr}, 1);
}

char *vmi_read_str_ksym(vmi_instance_t vmi, const char *sym)
{
    char *copy = NULL;
    addr_t address;
    if (vmi == NULL || sym == NULL)
        return NULL;
    bool taken = python_enter();
    if (symbol_address(vmi, sym, &address))
        copy = string_at(vmi, (struct place){PROCESS, 0, address}, 1);
    python_leave(taken);
    return copy;
}

uint16_t *vmi_read_wstr(vmi_instance_t vmi, const access_context_t *ctx)
{
    return string_of(vmi, ctx, 2);
}

uint16_t *vmi_read_wstr_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid)
{
    return string_at(vmi, (struct place){PROCESS, pid, vaddr}, 2);
}

uint16_t *vmi_read_wstr_pa(vmi_instance_t vmi, addr_t paddr)
{
    return string_at(vmi, (struct place){PHYSICAL, 0, paddr}, 2);
}

/* ---- opening, holding, closing ------------------------------------------------------------------------------------ */

static int as_python(void *key, void *value, void *data)
{
    PyObject **into = data; /* a dictionary, and the set of the keys whose values are strings */
    PyObject *name = text(key);
    int is_text = name ? PySet_Contains(into[1], name) : -1;
    PyObject *object = is_text < 0 || value == NULL ? NULL
                       : is_text                    ? text(value)
                                                    : PyLong_FromUnsignedLongLong(*(uint64_t *)value);
    if (object != NULL)
        PyDict_SetItem(into[0], name, object);
    Py_XDECREF(object);
    Py_XDECREF(name);
    return 0;
}

/* A configuration as Python takes it: text, a dictionary of a GHashTable, or None. */
static PyObject *configuration(PyObject *module, vmi_config_t mode, void *config)
{
    if (config == NULL || mode == VMI_CONFIG_GLOBAL_FILE_ENTRY)
        Py_RETURN_NONE;
    if (mode != VMI_CONFIG_GHASHTABLE)
        return text(config);
    void (*each)(void *, int (*)(void *, void *, void *), void *) = foreign(GLIB, "g_hash_table_foreach");
    if (each == NULL)
        Py_RETURN_NONE;
    PyObject *into[] = {PyDict_New(), PyObject_GetAttrString(module, "TEXTS")};
    if (into[0] != NULL && into[1] != NULL)
        each(config, as_python, into);
    Py_XDECREF(into[1]);
    return into[0];
}

static PyObject *socket_of(vmi_init_data_t *data)
{
    for (uint64_t i = 0; data != NULL && i < data->count && i < 64; i++)
        if (data->entry[i].type == VMI_INIT_DATA_KVMI_SOCKET && data->entry[i].data != NULL)
            return text(data->entry[i].data);
    Py_RETURN_NONE;
}

static PyObject *name_of(const void *domain, uint64_t flags)
{
    if (domain == NULL)
        Py_RETURN_NONE;
    if (flags & VMI_INIT_DOMAINID)
        return PyUnicode_FromFormat("%llu", (unsigned long long)*(const uint64_t *)domain);
    return text(domain);
}

/* What became known or useless by a call. */
static bool refresh(vmi_instance_t vmi)
{
    PyObject *words = PyObject_GetAttrString(vmi->guest, "words"), *cells = PyObject_GetAttrString(vmi->guest, "cells");
    if (words == NULL || cells == NULL || !PyDict_Check(words) || !PyDict_Check(cells)) {
        Py_XDECREF(words);
        Py_XDECREF(cells);
        PyErr_Clear();
        return false;
    }
    Py_XSETREF(vmi->words, words);
    Py_XSETREF(vmi->cells, cells);
    uint64_t width;
    vmi->width = number(ask(vmi, "address_width", "()"), &width) ? width : 0;
    return true;
}

static void dispose(vmi_instance_t vmi)
{
    Py_XDECREF(vmi->guest);
    Py_XDECREF(vmi->words);
    Py_XDECREF(vmi->cells);
    Py_XDECREF(vmi->key);
    Py_XDECREF(vmi->strings);
    Py_XDECREF(vmi->profiles);
    free(vmi);
}

/* With the GIL: `vmishim.capi.opened`, and an instance of what it returns. */
static vmi_init_error_t open_guest(PyObject *module, vmi_instance_t *into, PyObject *arguments)
{
    PyObject *call = arguments ? PyObject_GetAttrString(module, "opened") : NULL;
    PyObject *guest = call ? PyObject_CallObject(call, arguments) : NULL;
    Py_XDECREF(call);
    Py_XDECREF(arguments);
    if (guest == NULL) {
        PyErr_Print(); /* a bug: it returns its errors */
        return VMI_INIT_ERROR_DRIVER;
    }
    if (PyLong_Check(guest)) {
        vmi_init_error_t error = PyLong_AsLong(guest);
        Py_DECREF(guest);
        return error;
    }
    vmi_instance_t vmi = calloc(1, sizeof *vmi);
    if (vmi == NULL) {
        Py_DECREF(guest);
        return VMI_INIT_ERROR_DRIVER;
    }
    vmi->guest = guest;
    vmi->key = PyLong_FromUnsignedLongLong(1ULL << 63);
    vmi->strings = PyDict_New();
    vmi->profiles = PyList_New(0);
    uint64_t file = 0, old = 0, events = 0;
    if (!vmi->key || !vmi->strings || !vmi->profiles || !refresh(vmi) || !number(PyObject_GetAttrString(guest, "is_file"), &file) ||
        !number(PyObject_GetAttrString(guest, "abi_14"), &old) ||
        !number(PyObject_GetAttrString(guest, "events"), &events)) {
        dispose(vmi);
        return VMI_INIT_ERROR_DRIVER;
    }
    vmi->mode = file ? VMI_FILE : VMI_KVM;
    vmi->abi_14 = old;
    vmi->events = events;
    *into = vmi;
    return VMI_INIT_ERROR_NONE;
}

static status_t opened(vmi_instance_t *vmi, const void *domain, uint64_t flags, vmi_init_data_t *data, bool partial,
                       vmi_config_t mode, void *config, vmi_init_error_t *error)
{
    vmi_init_error_t failed = VMI_INIT_ERROR_DRIVER;
    PyObject *module = vmi ? python_module() : NULL;
    if (module != NULL) {
        bool taken = python_enter();
        failed = open_guest(module, vmi,
                            Py_BuildValue("(NKNOiN)", name_of(domain, flags), (unsigned long long)flags,
                                          socket_of(data), partial ? Py_True : Py_False, (int)mode,
                                          configuration(module, mode, config)));
        python_leave(taken);
    }
    if (failed && error)
        *error = failed;
    return failed ? VMI_FAILURE : VMI_SUCCESS;
}

status_t vmi_init(vmi_instance_t *vmi, vmi_mode_t mode, const void *domain, uint64_t flags, vmi_init_data_t *data,
                  vmi_init_error_t *error)
{
    (void)mode; /* the domain's entry says how it is reached */
    status_t status = opened(vmi, domain, flags, data, true, VMI_CONFIG_GLOBAL_FILE_ENTRY, NULL, error);
    if (status == VMI_FAILURE && vmi)
        *vmi = NULL;
    return status;
}

status_t vmi_init_complete(vmi_instance_t *vmi, const void *domain, uint64_t flags, vmi_init_data_t *data,
                           vmi_config_t mode, void *config, vmi_init_error_t *error)
{
    return opened(vmi, domain, flags, data, false, mode, config, error);
}

page_mode_t vmi_init_paging(vmi_instance_t vmi, uint64_t flags)
{
    if (vmi == NULL)
        return VMI_PM_UNKNOWN;
    bool taken = python_enter();
    done(ask(vmi, "init_paging", "(K)", (unsigned long long)flags));
    refresh(vmi);
    python_leave(taken);
    return vmi_get_page_mode(vmi, 0);
}

static os_t configured(vmi_instance_t vmi, const char *method, vmi_config_t mode, void *config, vmi_init_error_t *error)
{
    uint64_t failed = VMI_INIT_ERROR_OS;
    PyObject *module = vmi ? python_module() : NULL;
    if (module == NULL)
        return VMI_OS_UNKNOWN;
    bool taken = python_enter();
    if (!number(ask(vmi, method, "(iN)", (int)mode, configuration(module, mode, config)), &failed))
        failed = VMI_INIT_ERROR_OS;
    refresh(vmi);
    python_leave(taken);
    if (failed && error)
        *error = failed;
    return failed ? VMI_OS_UNKNOWN : VMI_OS_LINUX;
}

os_t vmi_init_os(vmi_instance_t vmi, vmi_config_t mode, void *config, vmi_init_error_t *error)
{
    return configured(vmi, "init_os", mode, config, error);
}

os_t vmi_init_profile(vmi_instance_t vmi, vmi_config_t mode, void *config)
{
    return configured(vmi, "init_profile", mode, config, NULL);
}

status_t vmi_destroy(vmi_instance_t vmi)
{
    if (vmi == NULL)
        return VMI_FAILURE;
    int (*put)(json_object *) =
        vmi->json || PyList_GET_SIZE(vmi->profiles) ? foreign(JSON, "json_object_put") : NULL;
    bool taken = python_enter();
    done(ask(vmi, "close", "()"));
    for (Py_ssize_t i = 0; put && i < PyList_GET_SIZE(vmi->profiles); i++)
        put(PyLong_AsVoidPtr(PyList_GET_ITEM(vmi->profiles, i)));
    if (put && vmi->json)
        put(vmi->json);
    dispose(vmi);
    python_leave(taken);
    return VMI_SUCCESS;
}

status_t vmi_pause_vm(vmi_instance_t vmi)
{
    return vmi && DO(vmi, "pause", "()") ? VMI_SUCCESS : VMI_FAILURE;
}

status_t vmi_resume_vm(vmi_instance_t vmi)
{
    return vmi && DO(vmi, "resume", "()") ? VMI_SUCCESS : VMI_FAILURE;
}

/* ---- addresses ---------------------------------------------------------------------------------------------------- */

/* A translation: a failure leaves `*value` alone. */
#define TRANSLATED(VMI, VALUE, ...)                                                                                    \
    ({                                                                                                                 \
        uint64_t value_;                                                                                               \
        bool taken_ = python_enter();                                                                                  \
        bool found_ = number(ask(VMI, __VA_ARGS__), &value_);                                                          \
        note_fault(VMI);                                                                                               \
        python_leave(taken_);                                                                                          \
        if (found_)                                                                                                    \
            *(VALUE) = value_;                                                                                         \
        found_ ? VMI_SUCCESS : VMI_FAILURE;                                                                            \
    })

static status_t looked_up(vmi_instance_t vmi, addr_t pt, addr_t vaddr, addr_t *paddr)
{
    return TRANSLATED(vmi, paddr, "lookup", "(KK)", (unsigned long long)pt, (unsigned long long)vaddr);
}

/* LibVMI sets the address to 0 where these tables do not map it, and leaves it alone where there are no tables. */
static status_t or_zero(vmi_instance_t vmi, status_t status, addr_t *paddr)
{
    if (status == VMI_FAILURE && vmi->faulted)
        *paddr = 0;
    return status;
}

status_t vmi_translate_kv2p(vmi_instance_t vmi, addr_t vaddr, addr_t *paddr)
{
    if (vmi == NULL || paddr == NULL)
        return VMI_FAILURE;
    return or_zero(vmi, TRANSLATED(vmi, paddr, "kernel_address", "(K)", (unsigned long long)vaddr), paddr);
}

status_t vmi_translate_uv2p(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, addr_t *paddr)
{
    if (vmi == NULL || paddr == NULL)
        return VMI_FAILURE;
    return or_zero(vmi, TRANSLATED(vmi, paddr, "process_address", "(Ki)", (unsigned long long)vaddr, pid), paddr);
}

status_t vmi_pagetable_lookup(vmi_instance_t vmi, addr_t pt, addr_t vaddr, addr_t *paddr)
{
    return vmi && paddr ? or_zero(vmi, looked_up(vmi, pt, vaddr, paddr), paddr) : VMI_FAILURE;
}

/* Symbols that are not known set what they are asked for to 0, a process that has no tables to -1, as in LibVMI. */
status_t vmi_translate_ksym2v(vmi_instance_t vmi, const char *symbol, addr_t *vaddr)
{
    if (vmi == NULL || symbol == NULL || vaddr == NULL)
        return VMI_FAILURE;
    *vaddr = 0;
    bool taken = python_enter();
    bool found = symbol_address(vmi, symbol, vaddr);
    python_leave(taken);
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

/* With the GIL: the page tables of a context, the address in it, and NULL if it names none. */
static PyObject *tables_of(vmi_instance_t vmi, const access_context_t *ctx)
{
    bool symbolic = vmi->abi_14 ? ((const access_context_14_t *)(const void *)ctx)->tm == VMI_TM_KERNEL_SYMBOL_14
                                : ctx->tm == VMI_TM_KERNEL_SYMBOL;
    struct place at = symbolic ? (struct place){NOWHERE, 0, 0} : place_of(vmi, ctx);
    if (at.kind != TABLES && at.kind != PROCESS)
        return NULL;
    return Py_BuildValue("(iLK)", at.kind, (long long)at.number, (unsigned long long)at.address);
}

status_t vmi_translate_sym2v(vmi_instance_t vmi, const access_context_t *ctx, const char *symbol, addr_t *vaddr)
{
    if (vmi == NULL || ctx == NULL || symbol == NULL || vaddr == NULL)
        return VMI_FAILURE;
    bool taken = python_enter(), found = false;
    PyObject *at = tables_of(vmi, ctx);
    if (at != NULL) {
        uint64_t value = 0;
        found = number(ask(vmi, "export", "(NN)", at, text(symbol)), &value);
        *vaddr = value;
    }
    python_leave(taken);
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

static const char *name_at(vmi_instance_t vmi, const char *method, const access_context_t *ctx, addr_t address)
{
    const char *name = NULL;
    if (vmi == NULL || ctx == NULL)
        return NULL;
    bool taken = python_enter();
    PyObject *at = tables_of(vmi, ctx);
    if (at != NULL)
        name = keep(vmi, ask(vmi, method, "(NK)", at, (unsigned long long)address));
    python_leave(taken);
    return name;
}

const char *vmi_translate_v2sym(vmi_instance_t vmi, const access_context_t *ctx, addr_t rva)
{
    return name_at(vmi, "export_name", ctx, rva);
}

const char *vmi_translate_v2ksym(vmi_instance_t vmi, const access_context_t *ctx, addr_t va)
{
    return name_at(vmi, "kernel_name", ctx, va);
}

status_t vmi_pid_to_dtb(vmi_instance_t vmi, vmi_pid_t pid, addr_t *dtb)
{
    if (vmi == NULL || dtb == NULL)
        return VMI_FAILURE;
    uint64_t value = 0;
    bool found = NUMBER(vmi, &value, "tables", "(i)", pid);
    if (found || vmi_get_ostype(vmi) != VMI_OS_UNKNOWN)
        *dtb = value;
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

status_t vmi_dtb_to_pid(vmi_instance_t vmi, addr_t dtb, vmi_pid_t *pid)
{
    if (vmi == NULL || pid == NULL)
        return VMI_FAILURE;
    uint64_t value = 0;
    bool found = NUMBER(vmi, &value, "process", "(K)", (unsigned long long)dtb);
    *pid = found ? (vmi_pid_t)value : -1;
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

/* A page as vmishim.capi describes it: (address, physical address, size, tables, entries); into either page_info_t. */
static bool fill(vmi_instance_t vmi, PyObject *page, page_info_t *info)
{
    unsigned long long vaddr, paddr, size, tables, entry[8] = {0};
    if (!PyArg_ParseTuple(page, "KKKK|(KKKKKKKK)", &vaddr, &paddr, &size, &tables, entry, entry + 1, entry + 2,
                          entry + 3, entry + 4, entry + 5, entry + 6, entry + 7)) {
        PyErr_Clear();
        return false;
    }
    struct entries entries = {entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7]};
    if (vmi->abi_14)
        *(page_info_14_t *)(void *)info =
            (page_info_14_t){.vaddr = vaddr, .dtb = tables, .paddr = paddr, .size = size, .x86_ia32e = entries};
    else {
        info->vaddr = vaddr, info->paddr = paddr, info->size = size;
        info->pt = tables, info->pm = VMI_PM_IA32E;
        info->x86_ia32e = entries;
    }
    return true;
}

status_t vmi_pagetable_lookup_extended(vmi_instance_t vmi, addr_t pt, addr_t vaddr, page_info_t *info)
{
    if (vmi == NULL || info == NULL)
        return VMI_FAILURE;
    bool taken = python_enter();
    PyObject *page = ask(vmi, "page", "(KK)", (unsigned long long)pt, (unsigned long long)vaddr);
    note_fault(vmi);
    bool found = page != NULL && fill(vmi, page, info);
    Py_XDECREF(page);
    python_leave(taken);
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

/* Nested page tables are the hypervisor's; without any, these are the calls above. */
static bool is_nested(page_mode_t npm, page_mode_t pm)
{
    return npm == VMI_PM_EPT_4L || npm == VMI_PM_EPT_5L || pm != VMI_PM_IA32E;
}

status_t vmi_nested_pagetable_lookup(vmi_instance_t vmi, addr_t npt, page_mode_t npm, addr_t pt, page_mode_t pm,
                                     addr_t vaddr, addr_t *paddr, addr_t *naddr)
{
    (void)npt, (void)naddr;
    return vmi == NULL || paddr == NULL || is_nested(npm, pm) ? VMI_FAILURE : looked_up(vmi, pt, vaddr, paddr);
}

status_t vmi_nested_pagetable_lookup_extended(vmi_instance_t vmi, addr_t npt, page_mode_t npm, addr_t pt,
                                              page_mode_t pm, addr_t vaddr, page_info_t *info)
{
    (void)npt;
    return is_nested(npm, pm) ? VMI_FAILURE : vmi_pagetable_lookup_extended(vmi, pt, vaddr, info);
}

/* A list of page_info_t; the caller frees it and them, by g_slist_free_full(list, g_free). */
GSList *vmi_get_va_pages(vmi_instance_t vmi, addr_t pt)
{
    GSList *(*prepend)(GSList *, void *) = vmi ? foreign(GLIB, "g_slist_prepend") : NULL;
    void *(*allocate)(size_t) = prepend ? foreign(GLIB, "g_malloc0") : NULL;
    GSList *list = NULL;
    if (allocate == NULL)
        return NULL;
    bool taken = python_enter();
    PyObject *pages = ask(vmi, "pages", "(K)", (unsigned long long)pt);
    for (Py_ssize_t i = pages && PyList_Check(pages) ? PyList_GET_SIZE(pages) : 0; i-- > 0;) {
        page_info_t *info = allocate(sizeof *info + 8); /* LibVMI's newest page_info_t is 8 bytes longer */
        fill(vmi, PyList_GET_ITEM(pages, i), info);
        list = prepend(list, info);
    }
    Py_XDECREF(pages);
    python_leave(taken);
    return list;
}

GSList *vmi_get_nested_va_pages(vmi_instance_t vmi, addr_t npt, page_mode_t npm, addr_t pt, page_mode_t pm)
{
    (void)npt;
    return is_nested(npm, pm) ? NULL : vmi_get_va_pages(vmi, pt);
}

/* ---- the guest ---------------------------------------------------------------------------------------------------- */

vmi_arch_t vmi_get_library_arch(void)
{
    return VMI_ARCH_X86_64;
}

char *vmi_get_name(vmi_instance_t vmi)
{
    const char *name = vmi ? STRING(vmi, "name", "()") : NULL;
    return name ? strdup(name) : NULL;
}

/* A number of the guest, 0 if it can't be told. */
static uint64_t told(vmi_instance_t vmi, const char *method)
{
    uint64_t value = 0;
    return vmi && NUMBER(vmi, &value, method, "()") ? value : 0;
}

uint64_t vmi_get_vmid(vmi_instance_t vmi)
{
    return told(vmi, "vmid");
}

status_t vmi_get_access_mode(vmi_instance_t vmi, const void *domain, uint64_t flags, vmi_init_data_t *data,
                             vmi_mode_t *mode)
{
    (void)data;
    if (vmi != NULL) {
        *mode = vmi->mode;
        return VMI_SUCCESS;
    }
    PyObject *module = python_module();
    if (module == NULL)
        return VMI_FAILURE;
    bool taken = python_enter();
    PyObject *found = PyObject_CallMethod(module, "access_mode", "(NK)", name_of(domain, flags),
                                          (unsigned long long)flags);
    long value = found && PyLong_Check(found) ? PyLong_AsLong(found) : -1;
    Py_XDECREF(found);
    PyErr_Clear();
    python_leave(taken);
    if (value >= 0)
        *mode = value;
    return value >= 0 ? VMI_SUCCESS : VMI_FAILURE;
}

page_mode_t vmi_get_page_mode(vmi_instance_t vmi, unsigned long vcpu)
{
    (void)vcpu;
    if (has_width(vmi))
        return vmi->abi_14 ? VMI_PM_IA32E_14 : VMI_PM_IA32E;
    return vmi && vmi->abi_14 ? VMI_PM_UNKNOWN_14 : VMI_PM_UNKNOWN;
}

uint8_t vmi_get_address_width(vmi_instance_t vmi)
{
    return vmi ? vmi->width : 0;
}

os_t vmi_get_ostype(vmi_instance_t vmi)
{
    return told(vmi, "ostype");
}

bool vmi_get_windows_build_info(vmi_instance_t vmi, win_build_info_t *info)
{
    (void)vmi, (void)info;
    return false;
}

win_ver_t vmi_get_winver(vmi_instance_t vmi)
{
    (void)vmi;
    return VMI_OS_WINDOWS_NONE;
}

uint16_t vmi_get_win_buildnumber(vmi_instance_t vmi)
{
    (void)vmi;
    return 0;
}

const char *vmi_get_winver_str(vmi_instance_t vmi)
{
    (void)vmi;
    return "VMI_OS_WINDOWS_NONE";
}

win_ver_t vmi_get_winver_manual(vmi_instance_t vmi, addr_t kdvb_pa)
{
    (void)vmi, (void)kdvb_pa;
    return VMI_OS_WINDOWS_NONE;
}

status_t vmi_get_offset(vmi_instance_t vmi, const char *offset_name, addr_t *offset)
{
    if (vmi == NULL || offset_name == NULL || offset == NULL)
        return VMI_FAILURE;
    uint64_t value;
    bool taken = python_enter();
    bool found = number(ask(vmi, "offset", "(N)", text(offset_name)), &value);
    python_leave(taken);
    if (found)
        *offset = value;
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

status_t vmi_get_kernel_struct_offset(vmi_instance_t vmi, const char *struct_name, const char *member, addr_t *addr)
{
    if (vmi == NULL || struct_name == NULL || member == NULL || addr == NULL)
        return VMI_FAILURE;
    uint64_t value;
    bool taken = python_enter();
    bool found = number(ask(vmi, "struct_offset", "(NN)", text(struct_name), text(member)), &value);
    python_leave(taken);
    if (found)
        *addr = value;
    return found ? VMI_SUCCESS : VMI_FAILURE;
}

const access_context_t *vmi_get_last_pagetable_lookup_fault(vmi_instance_t vmi)
{
    return vmi && vmi->faulted ? &vmi->fault : NULL;
}

uint64_t vmi_get_memsize(vmi_instance_t vmi)
{
    return told(vmi, "memory");
}

addr_t vmi_get_max_physical_address(vmi_instance_t vmi)
{
    return told(vmi, "memory");
}

unsigned int vmi_get_num_vcpus(vmi_instance_t vmi)
{
    return told(vmi, "vcpus");
}

const char *vmi_get_linux_sysmap(vmi_instance_t vmi)
{
    return vmi ? STRING(vmi, "sysmap", "()") : NULL;
}

const char *vmi_get_freebsd_sysmap(vmi_instance_t vmi)
{
    (void)vmi;
    return NULL;
}

const char *vmi_get_rekall_path(vmi_instance_t vmi)
{
    return vmi ? STRING(vmi, "json_path", "()") : NULL;
}

const char *vmi_get_os_profile_path(vmi_instance_t vmi)
{
    return vmi_get_rekall_path(vmi);
}

status_t vmi_get_vcpureg(vmi_instance_t vmi, uint64_t *value, reg_t reg, unsigned long vcpu)
{
    (void)vcpu;
    if (vmi == NULL || value == NULL || reg != CR3)
        return VMI_FAILURE;
    return TRANSLATED(vmi, value, "tables", "(i)", 0);
}

/* ---- what is believed --------------------------------------------------------------------------------------------- */

void vmi_v2pcache_flush(vmi_instance_t vmi, addr_t pt)
{
    if (vmi)
        DO(vmi, "forget_pages", "(K)", (unsigned long long)pt);
}

void vmi_v2pcache_nested_flush(vmi_instance_t vmi, addr_t pt, addr_t npt)
{
    if (vmi && !npt)
        vmi_v2pcache_flush(vmi, pt);
}

void vmi_v2pcache_add(vmi_instance_t vmi, addr_t va, addr_t pt, addr_t pa)
{
    if (vmi)
        DO(vmi, "add_page", "(KKK)", (unsigned long long)va, (unsigned long long)pt, (unsigned long long)pa);
}

void vmi_v2pcache_nested_add(vmi_instance_t vmi, addr_t va, addr_t pt, addr_t npt, addr_t pa)
{
    if (vmi && !npt)
        vmi_v2pcache_add(vmi, va, pt, pa);
}

#define FLUSHES(NAME, METHOD)                                                                                          \
    void vmi_##NAME##_flush(vmi_instance_t vmi)                                                                        \
    {                                                                                                                  \
        if (vmi)                                                                                                       \
            DO(vmi, METHOD, "()");                                                                                     \
    }
FLUSHES(symcache, "forget_symbols")
FLUSHES(rvacache, "forget_names")
FLUSHES(pidcache, "forget_processes")
FLUSHES(pagecache, "forget_memory")

void vmi_symcache_add(vmi_instance_t vmi, addr_t base_addr, vmi_pid_t pid, char *sym, addr_t va)
{
    if (vmi == NULL || sym == NULL)
        return;
    bool taken = python_enter();
    done(ask(vmi, "add_symbol", "(KiNK)", (unsigned long long)base_addr, pid, text(sym), (unsigned long long)va));
    python_leave(taken);
}

void vmi_rvacache_add(vmi_instance_t vmi, addr_t base_addr, vmi_pid_t pid, addr_t rva, char *sym)
{
    if (vmi == NULL || sym == NULL)
        return;
    bool taken = python_enter();
    done(ask(vmi, "add_name", "(KiKN)", (unsigned long long)base_addr, pid, (unsigned long long)rva, text(sym)));
    python_leave(taken);
}

void vmi_pidcache_add(vmi_instance_t vmi, vmi_pid_t pid, addr_t dtb)
{
    if (vmi)
        DO(vmi, "add_process", "(iK)", pid, (unsigned long long)dtb);
}

/* ---- writes: vmishim only reads ----------------------------------------------------------------------------------- */

static status_t refused(vmi_instance_t vmi, bool whole, size_t count, size_t *written)
{
    if (written)
        *written = 0;
    return vmi != NULL && whole && count == 0 ? VMI_SUCCESS : VMI_FAILURE;
}

status_t vmi_write(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *bytes_written)
{
    return refused(vmi, ctx && buf, count, bytes_written);
}

status_t vmi_write_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, size_t count, void *buf, size_t *bytes_written)
{
    (void)vaddr, (void)pid;
    return refused(vmi, buf, count, bytes_written);
}

status_t vmi_write_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *bytes_written)
{
    (void)paddr;
    return refused(vmi, buf, count, bytes_written);
}

status_t vmi_write_ksym(vmi_instance_t vmi, const char *sym, size_t count, void *buf, size_t *bytes_written)
{
    addr_t address;
    return refused(vmi, buf && sym && vmi_translate_ksym2v(vmi, sym, &address) == VMI_SUCCESS, count, bytes_written);
}

#define WRITES(NAME, TYPE)                                                                                             \
    status_t vmi_write_##NAME(vmi_instance_t vmi, const access_context_t *ctx, TYPE *value)                            \
    {                                                                                                                  \
        return vmi_write(vmi, ctx, sizeof *value, value, NULL);                                                        \
    }                                                                                                                  \
    status_t vmi_write_##NAME##_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, TYPE *value)                       \
    {                                                                                                                  \
        return vmi_write_va(vmi, vaddr, pid, sizeof *value, value, NULL);                                              \
    }                                                                                                                  \
    status_t vmi_write_##NAME##_pa(vmi_instance_t vmi, addr_t paddr, TYPE *value)                                      \
    {                                                                                                                  \
        return vmi_write_pa(vmi, paddr, sizeof *value, value, NULL);                                                   \
    }                                                                                                                  \
    status_t vmi_write_##NAME##_ksym(vmi_instance_t vmi, const char *sym, TYPE *value)                                 \
    {                                                                                                                  \
        return vmi_write_ksym(vmi, sym, sizeof *value, value, NULL);                                                   \
    }
WRITES(8, uint8_t)
WRITES(16, uint16_t)
WRITES(32, uint32_t)
WRITES(64, uint64_t)
WRITES(addr, addr_t)

/* ---- output ------------------------------------------------------------------------------------------------------- */

/* Sixteen bytes a line, in two groups: where, as numbers, as text. */
void vmi_print_hex(const unsigned char *data, unsigned long length)
{
    for (unsigned long row = 0; row < length; row += 16) {
        printf("%.8lx|  ", row);
        for (unsigned long at = row; at < row + 16; at++) {
            if (at < length)
                printf("%.2x ", data[at]);
            else
                printf("   ");
            if (at == row + 7)
                putchar(' ');
        }
        printf("  ");
        for (unsigned long at = row; at < row + 16 && at < length; at++)
            putchar(isprint(data[at]) ? data[at] : '.');
        putchar('\n');
    }
}

static void print_at(vmi_instance_t vmi, struct place at, size_t length)
{
    unsigned char *data = malloc(length ? length : 1);
    if (data != NULL && read_at(vmi, at, length, data, NULL) == VMI_SUCCESS)
        vmi_print_hex(data, length);
    free(data);
}

void vmi_print_hex_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, size_t length)
{
    print_at(vmi, (struct place){PROCESS, pid, vaddr}, length);
}

void vmi_print_hex_pa(vmi_instance_t vmi, addr_t paddr, size_t length)
{
    print_at(vmi, (struct place){PHYSICAL, 0, paddr}, length);
}

void vmi_print_hex_ksym(vmi_instance_t vmi, const char *sym, size_t length)
{
    addr_t address;
    if (vmi_translate_ksym2v(vmi, sym, &address) == VMI_SUCCESS)
        vmi_print_hex_va(vmi, address, 0, length);
}

/* ---- strings of other encodings ----------------------------------------------------------------------------------- */

status_t vmi_convert_str_encoding(const unicode_string_t *in, unicode_string_t *out, const char *outencoding)
{
    if (in == NULL || out == NULL)
        return VMI_FAILURE;
    size_t left = in->length, room = 2 * (left + 1), whole = room;
    char *from = (char *)in->contents, *contents = calloc(1, room), *to = contents;
    memset(out, 0, sizeof *out);
    iconv_t converter = contents ? iconv_open(outencoding, in->encoding) : (iconv_t)-1;
    bool converted = false;
    if (converter != (iconv_t)-1) {
        converted = iconv(converter, &from, &left, &to, &room) != (size_t)-1;
        iconv_close(converter);
    }
    if (!converted) {
        free(contents);
        return VMI_FAILURE;
    }
    *out = (unicode_string_t){whole - room, (uint8_t *)contents, outencoding};
    return VMI_SUCCESS;
}

void vmi_free_unicode_str(unicode_string_t *p_us)
{
    if (p_us != NULL)
        free(p_us->contents);
    free(p_us);
}

/* ---- JSON profiles ------------------------------------------------------------------------------------------------ */

/* The profile that the guest was configured by, as json-c reads it; NULL without one. */
json_object *vmi_get_kernel_json(vmi_instance_t vmi)
{
    const char *path = vmi_get_rekall_path(vmi);
    if (path != NULL && vmi->json == NULL) {
        json_object *(*read)(const char *) = foreign(JSON, "json_object_from_file");
        vmi->json = read ? read(path) : NULL;
    }
    return vmi ? vmi->json : NULL;
}

/* With the GIL: whether the guest knows the profile, which is handed over as text once. */
static bool knows(vmi_instance_t vmi, json_object *json)
{
    if (vmi == NULL || json == NULL)
        return false;
    uint64_t known_already = 0;
    if (!number(ask(vmi, "knows_json", "(KO)", (unsigned long long)(uintptr_t)json,
                    json == vmi->json ? Py_True : Py_False),
                &known_already))
        return false;
    if (known_already)
        return true;
    const char *(*print)(json_object *, int) = foreign(JSON, "json_object_to_json_string_ext");
    json_object *(*get)(json_object *) = print ? foreign(JSON, "json_object_get") : NULL;
    const char *printed = get ? print(json, 0) : NULL;
    if (printed == NULL)
        return false;
    PyObject *address = PyLong_FromVoidPtr(get(json)); /* ours until the end: its address is its name */
    PyList_Append(vmi->profiles, address);
    Py_XDECREF(address);
    return done(ask(vmi, "take_json", "(Ky)", (unsigned long long)(uintptr_t)json, printed));
}

/* A number of a profile. */
static bool in_json(vmi_instance_t vmi, json_object *json, const char *method, const char *name, const char *member,
                    uint64_t *value)
{
    bool taken = python_enter();
    bool found = name != NULL && knows(vmi, json) &&
                 number(ask(vmi, method, "(KNN)", (unsigned long long)(uintptr_t)json, text(name),
                            text(member ? member : "")),
                        value);
    python_leave(taken);
    return found;
}

status_t vmi_get_symbol_addr_from_json(vmi_instance_t vmi, json_object *json, const char *symbol, addr_t *addr)
{
    uint64_t value;
    if (addr == NULL || !in_json(vmi, json, "json_symbol", symbol, NULL, &value))
        return VMI_FAILURE;
    *addr = value;
    return VMI_SUCCESS;
}

status_t vmi_get_struct_size_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name, size_t *size)
{
    uint64_t value;
    if (size == NULL || !in_json(vmi, json, "json_size", struct_name, NULL, &value))
        return VMI_FAILURE;
    *size = value;
    return VMI_SUCCESS;
}

status_t vmi_get_struct_member_offset_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                                const char *struct_member, addr_t *offset)
{
    uint64_t value;
    if (offset == NULL || struct_member == NULL ||
        !in_json(vmi, json, "json_offset", struct_name, struct_member, &value))
        return VMI_FAILURE;
    *offset = value;
    return VMI_SUCCESS;
}

status_t vmi_get_bitfield_offset_and_size_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                                    const char *struct_member, addr_t *offset, size_t *start_bit,
                                                    size_t *end_bit)
{
    uint64_t at, first, last;
    if (struct_member == NULL || !in_json(vmi, json, "json_bit_offset", struct_name, struct_member, &at) ||
        !in_json(vmi, json, "json_first_bit", struct_name, struct_member, &first) ||
        !in_json(vmi, json, "json_last_bit", struct_name, struct_member, &last))
        return VMI_FAILURE;
    if (offset)
        *offset = at;
    if (start_bit)
        *start_bit = first;
    if (end_bit)
        *end_bit = last;
    return VMI_SUCCESS;
}

status_t vmi_get_struct_field_type_name(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                        const char *struct_member, const char **member_type_name)
{
    if (struct_name == NULL || struct_member == NULL || member_type_name == NULL)
        return VMI_FAILURE;
    bool taken = python_enter();
    const char *name = NULL;
    if (knows(vmi, json))
        name = keep(vmi, ask(vmi, "json_type", "(KNN)", (unsigned long long)(uintptr_t)json, text(struct_name),
                             text(struct_member)));
    python_leave(taken);
    if (name != NULL)
        *member_type_name = name;
    return name ? VMI_SUCCESS : VMI_FAILURE;
}

status_t vmi_get_struct_field_type_name_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                                  const char *struct_member, const char **member_type_name)
{
    return vmi_get_struct_field_type_name(vmi, json, struct_name, struct_member, member_type_name);
}

/* ---- events: there are none, and with VMISHIM_LIBVMI_EVENTS=poll a program may wait for them --------------------- */

uint32_t vmi_events_version(void)
{
    const char *abi = secure_getenv("VMISHIM_LIBVMI_ABI");
    return abi && !strcmp(abi, "0.14") ? 7 : 9;
}

int vmi_are_events_pending(vmi_instance_t vmi)
{
    return vmi && vmi->events ? 0 : -1;
}

status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout)
{
    if (vmi == NULL || !vmi->events)
        return VMI_FAILURE;
    struct timespec time = {timeout / 1000, timeout % 1000 * 1000000L};
    nanosleep(&time, NULL); /* a signal ends it, as it ends LibVMI's */
    return VMI_SUCCESS;
}
