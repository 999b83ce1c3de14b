"""``libvmi.conf`` as LibVMI itself reads it: ``python -m trials.configs --runs N --seed S``."""
