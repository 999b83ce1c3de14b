/* Finds the interpreter, or starts one: that of the environment which vmishim is installed in, and no other. */
#define _GNU_SOURCE
#include "python.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef VMISHIM_PYTHON
#define VMISHIM_PYTHON ""
#endif

__thread PyThreadState *python_thread __attribute__((tls_model("initial-exec"), visibility("hidden")));

static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static PyObject *module;
static pthread_key_t ending; /* of threads whose state was made here */

static void say(const char *what)
{
    fprintf(stderr, "libvmi.so.0 of vmishim: %s\n", what);
}

/* At the end of a thread: frees its state. */
static void forget(void *state)
{
    if (!Py_IsInitialized())
        return;
    PyEval_RestoreThread(state);
    python_thread = NULL;
    PyThreadState_Clear(state);
    PyThreadState_DeleteCurrent();
}

/* The first call of a thread. Its state is kept until the thread ends: making one costs more than a read. */
bool python_first(void)
{
    PyThreadState *known = PyGILState_GetThisThreadState();
    bool held = known != NULL && python_current() == known;
    PyGILState_Ensure();
    python_thread = PyThreadState_Get();
    if (known == NULL)
        pthread_setspecific(ending, python_thread);
    return !held;
}

/* The program forks. Python's own fork does all this itself, and holds the GIL while it does. */
static __thread bool forking, taken;

static void before_fork(void)
{
    forking = python_thread == NULL || python_current() != python_thread;
    if (forking) {
        taken = python_enter();
        PyOS_BeforeFork();
    }
}

static void after_fork_in_parent(void)
{
    if (forking) {
        PyOS_AfterFork_Parent();
        python_leave(taken);
    }
    forking = false;
}

static void after_fork_in_child(void)
{
    if (forking) {
        PyOS_AfterFork_Child();
        python_leave(taken);
    }
    forking = false;
}

/* The interpreter of the environment that this library is in, PREFIX/lib/python3.11/site-packages/vmishim/compat/capi;
 * else the one that it was built by. VMISHIM_PYTHON names another. */
static const char *interpreter(char *buffer)
{
    const char *named = secure_getenv("VMISHIM_PYTHON");
    if (named != NULL && *named)
        return named;
    Dl_info here;
    if (dladdr((void *)python_module, &here) && realpath(here.dli_fname, buffer)) {
        char *lib = strstr(buffer, "/lib/python" Py_STRINGIFY(PY_MAJOR_VERSION) "." Py_STRINGIFY(PY_MINOR_VERSION) "/");
        if (lib != NULL) {
            strcpy(lib, "/bin/python" Py_STRINGIFY(PY_MAJOR_VERSION) "." Py_STRINGIFY(PY_MINOR_VERSION));
            if (access(buffer, X_OK) == 0)
                return buffer;
        }
    }
    return VMISHIM_PYTHON;
}

/* Extension modules expect libpython's symbols to be global, and a program may have loaded us with RTLD_LOCAL. */
static void promote(void)
{
    Dl_info python;
    if (dladdr((void *)Py_IsInitialized, &python) && python.dli_fname)
        dlopen(python.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

static bool start(const char *python)
{
    PyPreConfig before;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1; /* the program's locale stays as it is */
    PyStatus status = Py_PreInitialize(&before);
    PyConfig config;
    if (!PyStatus_Exception(status)) {
        PyConfig_InitIsolatedConfig(&config);
        config.install_signal_handlers = 0; /* signals are the program's */
        status = PyConfig_SetBytesString(&config, &config.program_name, python);
        if (!PyStatus_Exception(status))
            status = Py_InitializeFromConfig(&config);
        PyConfig_Clear(&config);
    }
    if (PyStatus_Exception(status)) {
        fprintf(stderr, "libvmi.so.0 of vmishim: Python cannot start: %s\n", status.err_msg ? status.err_msg : "?");
        return false;
    }
    return true;
}

/* With the GIL. */
static void import(const char *python)
{
    PyObject *found = PyImport_ImportModule("vmishim.capi");
    if (found == NULL) {
        PyObject *kind, *value, *trace;
        PyErr_Fetch(&kind, &value, &trace);
        PyErr_NormalizeException(&kind, &value, &trace);
        PyObject *text = value ? PyObject_Str(value) : NULL;
        fprintf(stderr,
                "libvmi.so.0 of vmishim: %s cannot import vmishim: %s. This library needs the environment that vmishim is "
                "installed in, of Python %d.%d; set VMISHIM_PYTHON to its interpreter, or start the program by `vmishim "
                "run`\n",
                python, text ? PyUnicode_AsUTF8(text) : "?", PY_MAJOR_VERSION, PY_MINOR_VERSION);
        Py_XDECREF(text);
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        PyErr_Clear();
    }
    module = found;
}

PyObject *python_module(void)
{
    if (__atomic_load_n(&module, __ATOMIC_ACQUIRE) != NULL)
        return module;
    static const char built_for[] = Py_STRINGIFY(PY_MAJOR_VERSION) "." Py_STRINGIFY(PY_MINOR_VERSION) ".";
    static bool failed, keyed;
    char buffer[PATH_MAX];
    if (strncmp(Py_GetVersion(), built_for, sizeof built_for - 1)) {
        if (!failed)
            say("this process runs another version of Python than the one that this library was built for");
        failed = true;
        return NULL;
    }
    if (Py_IsInitialized() && python_current() != NULL && PyGILState_Check()) {
        /* Called with the GIL: another thread that starts would need it. */
        if (module == NULL && !failed) {
            if (!keyed)
                keyed = pthread_key_create(&ending, forget) == 0;
            import("this process");
            failed = module == NULL;
        }
        return module;
    }
    pthread_mutex_lock(&starting);
    if (module == NULL && !failed) {
        if (!keyed)
            keyed = pthread_key_create(&ending, forget) == 0;
        promote();
        const char *python = "this process";
        bool running = Py_IsInitialized();
        if (!running) {
            python = interpreter(buffer);
            running = start(python);
            if (running) {
                import(python);
                python_thread = PyThreadState_Get();
                if (module != NULL)
                    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
                PyEval_SaveThread();
            }
        } else {
            bool free = python_enter();
            import(python);
            python_leave(free);
        }
        failed = module == NULL;
    }
    pthread_mutex_unlock(&starting);
    return module;
}
