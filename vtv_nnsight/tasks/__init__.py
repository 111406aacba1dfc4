from vtv_nnsight.tasks.base import *  # noqa
