"""Processes: hidden ones, raised credentials, programs without a file, and those that pose as kernel threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmishim.inspection.checks.view import View, named
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.lists import ring
from vmishim.inspection.objects import Task
from vmishim.inspection.structures import ENTRIES_MAX, BrokenError
from vmishim.libvmi.limits import TASK_LIMIT

PID, TGID, SID = 0, 1, 3
"""What a struct pid can stand for: a thread, a process, a session (include/linux/pid_types.h)."""
PF_KTHREAD = 0x200000
"""Flag of a kernel thread (include/linux/sched.h)."""
S_ISUID = 0o4000
ANCESTORS_MAX = 1000
COMM_SIZE = 16

TASKS, TABLE, CHILDREN = "the list of tasks", "the table of pids", "the lists of children"


def hidden_processes(view: View) -> Iterator[Finding]:
    """Processes and threads that are in one of the kernel's lists and missing from another."""
    listed = {task.address for task in view.tasks}
    idle = view.symbol("init_task")
    threads, leaders = set[int](), {idle}
    table = view.symbol("init_pid_ns") + view.at("pid_namespace idr")
    for number, pid in view.idr(table, TABLE):
        with view.marking(f"pid {number}"):
            threads.add(_task_of(view, pid, PID))
            leaders.add(_task_of(view, pid, TGID))
    leaders.discard(0)
    threads.discard(0)
    born = {idle, *_descendants(view, idle)}
    views = {TASKS: listed, TABLE: leaders, CHILDREN: born}
    everywhere = listed | leaders | born
    for task in sorted(everywhere):
        lacking = [name for name, found in views.items() if task not in found]
        if lacking:
            yield _hidden(view, task, "process", lacking, [name for name in views if name not in lacking])
    grouped = {thread for task in everywhere for thread in view.threads(task)}
    for task in sorted(threads - grouped):
        yield _hidden(view, task, "thread", ["the list of its process's threads"], [TABLE])


def _task_of(view: View, pid: int, kind: int) -> int:
    """The first task that a struct pid stands for, 0 if none. An hlist_node has two pointers, for each kind."""
    link = view.pointer(pid + view.at("pid tasks") + 8 * kind)
    return link - view.at("task_struct pid_links") - 16 * kind if link else 0


def _descendants(view: View, task: int) -> Iterator[int]:
    pending, seen = [task], {task}
    link = view.at("task_struct sibling")
    while pending:
        parent = pending.pop()
        for thread in view.threads(parent):
            head, what = thread + view.at("task_struct children"), f"the children of the process at {parent:#x}"
            for child in ring(view.vmi, head, link, TASK_LIMIT, view.damage, what):
                if child not in seen and len(seen) < ENTRIES_MAX:
                    seen.add(child)
                    pending.append(child)
                    yield child


def _hidden(view: View, task: int, what: str, lacking: list[str], present: list[str]) -> Finding:
    pid, comm = None, "?"
    with view.marking(f"the {what} at {task:#x}"):
        pid = view.value(task, "task_struct pid")
        comm = view.text(task + view.at("task_struct comm"), COMM_SIZE)
    return Finding(
        f"hidden-{what}",
        Severity.HIGH,
        comm,
        f"the {what} {'?' if pid is None else pid} {comm} is missing from {' and '.join(lacking)}",
        f"{', '.join(present)} with {', '.join(lacking)}",
        {"task_struct": task},
        "its executable, open files and sockets; then hidden modules and hooks, as the kernel was changed",
        "T1014",
        pid,
    )


# Credentials.


@dataclass(frozen=True)
class _User:
    """A process, or a thread with credentials of its own."""

    task: Task
    cred: int
    uid: int
    euid: int


def credentials(view: View) -> Iterator[Finding]:
    """Credentials that are shared between processes, are the kernel's own, or were raised to root's."""
    users = [user for task in view.tasks for user in _users(view, task)]
    init_cred = view.symbol("init_cred")
    by_task = {task.address: task for task in view.tasks}
    sharing: dict[int, set[int]] = {}
    for user in users:
        sharing.setdefault(user.cred, set()).add(user.task.tgid)
    reported = set()
    for user in users:
        key = user.task.tgid, user.cred
        if key in reported:
            continue  # threads of a process may share credentials among them
        reported.add(key)
        others = sorted(sharing[user.cred] - {user.task.tgid})
        mm = view.memories.get(user.task.address, 0)
        if mm and user.cred == init_cred:
            text, compared = "has the kernel's own credentials, init_cred", "its cred with init_cred"
            yield _cred("kernel-credentials", Severity.HIGH, user, text, compared)
        elif others and user.cred != init_cred:
            text = f"has the same struct cred as {', '.join(map(str, others[:8]))}"
            yield _cred("shared-credentials", Severity.HIGH, user, text, "the addresses of all processes' cred")
        elif mm and user.euid == 0:
            with view.marking(f"what made {named(user.task)} root's"):
                why = _unexplained(view, user, by_task)
                if why:
                    compared = "its user with that of its parent and session leader, and its executable's mode"
                    yield _cred("raised-credentials", Severity.MEDIUM, user, f"is root's, but its {why}", compared)


def _cred(kind: str, severity: Severity, user: _User, words: str, compared: str) -> Finding:
    return Finding(
        kind,
        severity,
        user.task.comm,
        f"{named(user.task)} {words}",
        compared,
        {"task_struct": user.task.address, "cred": user.cred},
        "how it started: its parent, session and executable; a daemon that gave up root after it started a root child "
        "looks the same",
        "T1068",
        user.task.pid,
    )


def _users(view: View, task: Task) -> Iterator[_User]:
    met = set[int]()
    for thread in view.threads(task.address):
        with view.marking(f"cred of {named(task)}"):
            cred = view.field(thread, "task_struct cred")
            if cred not in met:
                met.add(cred)
                yield _User(task, cred, view.value(cred, "cred uid"), view.value(cred, "cred euid"))


def _unexplained(view: View, user: _User, by_task: dict[int, Task]) -> str:
    """The user of a root process's parent or session, if it is not root's and no set-uid file explains it."""
    if _is_set_uid(view, user.task):
        return ""
    parent = _parent(view, user.task, by_task)
    if parent is None:
        return ""
    if parent.uid != 0:
        return f"parent {named(parent)} is of uid {parent.uid}"
    pids = view.field(user.task.address, "task_struct signal") + view.at("signal_struct pids")
    pid = view.pointer(pids + 8 * SID)
    leader = by_task.get(_task_of(view, pid, TGID)) if pid else None
    if leader is None or leader.uid in (0, None):
        return ""
    for _ in range(ANCESTORS_MAX):
        # Up to where root's uid comes from.
        if parent.uid != 0 or _is_set_uid(view, parent):
            return ""
        above = _parent(view, parent, by_task)
        if above is None or parent.address in (leader.address, above.address):
            break
        parent = above
    return f"session's leader {named(leader)} is of uid {leader.uid}"


def _parent(view: View, task: Task, by_task: dict[int, Task]) -> Task | None:
    """The parent process, if it is listed: a hidden one is another check's finding."""
    thread = view.field(task.address, "task_struct real_parent")
    found = by_task.get(view.field(thread, "task_struct group_leader"))
    if found is not None and found.uid is None:
        raise BrokenError(f"the user of {named(found)} cannot be read")
    return found


def _is_set_uid(view: View, task: Task) -> bool:
    """Whether it runs a set-uid file that root owns."""
    file = view.executable(task)
    if not file:
        return False
    inode = view.field(file, "file f_inode")
    return bool(view.value(inode, "inode i_mode") & S_ISUID) and view.value(inode, "inode i_uid") == 0


# Executables.


def executables(view: View) -> Iterator[Finding]:
    """Programs that run from memory only, or whose file was deleted and not replaced.

    An updated daemon runs a deleted file too; another file of that name is in its folder then.
    """
    for task in view.tasks:
        with view.marking(f"the executable of {named(task)}"):
            file = view.executable(task)
            if not file:
                continue
            dentry = view.field(file, "file f_path.dentry")
            if view.pointer(dentry + view.at("dentry d_hash") + 8):  # pprev: null if it is in no folder
                continue
            evidence = {"task_struct": task.address, "file": file, "dentry": dentry}
            name = view.string(view.field(dentry, "dentry d_name.name"))
            if view.field(dentry, "dentry d_parent") == dentry:
                yield Finding(
                    "memory-only-executable",
                    Severity.HIGH,
                    task.comm,
                    f"{named(task)} runs {name}, which is in no file system",
                    "the executable's dentry with the folders of its file system",
                    evidence,
                    "who started it, and its memory: the program is nowhere else",
                    "T1620",
                    task.pid,
                )
            elif not _is_replaced(view, dentry, name):
                yield Finding(
                    "deleted-executable",
                    Severity.MEDIUM,
                    task.comm,
                    f"{named(task)} runs {name}, which was deleted and not replaced",
                    "the executable's dentry with the names in its folder that the kernel has cached",
                    evidence,
                    "whether a package was removed or updated while it ran; its memory still has the program",
                    "T1070.004",
                    task.pid,
                )


def _is_replaced(view: View, dentry: int, name: str) -> bool:
    """Whether another file has a deleted one's name by now, as after an update."""
    parent = view.field(dentry, "dentry d_parent")
    what = f"the names beside {name}"
    siblings: Iterator[int]
    if view.has("dentry d_children"):
        # Since 6.8 (da549bdd15c2 "dentry: switch the lists of children to hlist").
        link = view.at("dentry d_sib")
        siblings = (node - link for node in view.hlist(parent + view.at("dentry d_children"), what))
    else:
        head = parent + view.at("dentry d_subdirs")
        siblings = ring(view.vmi, head, view.at("dentry d_child"), ENTRIES_MAX, view.damage, what)
    length = view.value(dentry, "dentry d_name.len")
    for sibling in siblings:
        with view.marking(what):
            if sibling != dentry and view.value(sibling, "dentry d_name.len") == length:
                is_there = view.pointer(sibling + view.at("dentry d_hash") + 8) and view.field(
                    sibling, "dentry d_inode"
                )
                if is_there and view.string(view.field(sibling, "dentry d_name.name")) == name:
                    return True
    return False


# Kernel threads.


def kernel_threads(view: View) -> Iterator[Finding]:
    """Kernel threads that have a user's memory, and processes that go by the name of a kernel thread."""
    threads, processes = dict[str, Task](), list[tuple[Task, int]]()
    for task in view.tasks:
        with view.marking(f"flags of {named(task)}"):
            is_thread = view.value(task.address, "task_struct flags") & PF_KTHREAD
            mm = view.memories.get(task.address, 0)
            if is_thread and mm:
                yield Finding(
                    "kernel-thread-with-memory",
                    Severity.MEDIUM,
                    task.comm,
                    f"{named(task)} is marked as a kernel thread, but has a user's memory",
                    "its flags with its mm",
                    {"task_struct": task.address, "mm_struct": mm},
                    "its executable; a driver may borrow a process's memory for a moment (kthread_use_mm)",
                    "T1036.004",
                    task.pid,
                )
            elif is_thread:
                threads[_family(task.comm)] = task
            elif mm:
                processes.append((task, mm))
    for task, mm in processes:
        like = threads.get(_family(task.comm))
        if like is not None and task.comm:
            yield Finding(
                "poses-as-kernel-thread",
                Severity.MEDIUM,
                task.comm,
                f"{named(task)} goes by the name of a kernel thread, but is a process",
                f"its name with that of the kernel thread {named(like)}, and its mm",
                {"task_struct": task.address, "mm_struct": mm},
                "its executable and command line",
                "T1036.004",
                task.pid,
            )


def _family(comm: str) -> str:
    """A kernel thread's name without its number: ``kworker`` for ``kworker/0:1``."""
    return f"{comm.partition('/')[0]}/" if "/" in comm else comm
