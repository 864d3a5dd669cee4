"""Schemas of the state of a loss per sample of the training set."""

from tempnet_kernels.core import register

# tables: at most eight, float32 [samples] -> their values at ids [B] int64, [K, B]. Outside, which
# is checked on the CPU, it is inf: it is seen in the loss, and does not reach a table.
register.define(
    "read_samples(Tensor[] tables, Tensor ids) -> Tensor",
    lambda tables, ids: tables[0].new_empty((len(tables), ids.shape[0])),
    "per_sample_state",
)
# table[ids] = values, of values [K, B] float32 a row for each table; of equal ids the last of the
# batch counts. `order` [B] int64 is what sorting the ids stably gave, of which `ids` is the other
# result: threads of a GPU write at once. Empty on the CPU, where ids stand as they come.
register.define(
    "write_samples_(Tensor(a!)[] tables, Tensor ids, Tensor order, Tensor values) -> ()",
    lambda *args: None,
    "per_sample_state",
)
