"Wrong gradients across processes, each a bug that others have had; `plant(name)` puts one into the library."
import torch
import torch.distributed as dist


def no_negatives_of_others():
    from simclr_nb import learner
    learner.gather_rows = None


def no_gradient_through_the_gather():
    "Every process counts only what its loss says of its own rows."
    from simclr_nb import learner
    from simclr_nb.distributed import gather_rows
    def gather(z):
        rows, first = gather_rows(z.detach())
        return torch.cat([rows[:first], z, rows[first + len(z):]]), first
    learner.gather_rows = gather


def gradients_are_summed():
    from simclr_nb.training import callbacks
    class Summing(callbacks.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, summed)
    def summed(state, bucket):
        sent = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return sent.then(lambda done: done.value()[0])
    callbacks.DistributedDataParallel = Summing


def batch_norm_of_each_process():
    from simclr_nb.training import callbacks
    callbacks.global_batch_norm = lambda model: model


faults = dict(negatives=no_negatives_of_others, gather=no_gradient_through_the_gather, sum=gradients_are_summed,
              batch_norm=batch_norm_of_each_process)


def plant(name): faults[name]()
