/* The Python interpreter that libvmi.so.0 works by: the one of the process, or one of its own. */
#ifndef VMISHIM_PYTHON_H
#define VMISHIM_PYTHON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

/* vmishim.capi, a borrowed reference; NULL if there is no interpreter that has it, which is printed once. Call it before
 * anything else here. */
PyObject *python_module(void);

extern __thread PyThreadState *python_thread __attribute__((tls_model("initial-exec"), visibility("hidden")));
bool python_first(void);

#if PY_VERSION_HEX >= 0x030D0000
#define python_current PyThreadState_GetUnchecked
#else
#define python_current _PyThreadState_UncheckedGet
#endif

/* Takes the GIL. Returns whether it was free: a caller that holds it, such as Python code that called us, keeps it. */
static inline bool python_enter(void)
{
    PyThreadState *thread = python_thread;
    if (__builtin_expect(thread == NULL, 0))
        return python_first();
    if (python_current() == thread)
        return false;
    PyEval_RestoreThread(thread);
    return true;
}

/* Ends what python_enter began. */
static inline void python_leave(bool taken)
{
    if (taken)
        PyEval_SaveThread();
}

#endif
