"""Sizes that a room allocates and the memory plan counts; here, since neither may import the other. Imports nothing."""

# Columns that a full layer of the KV cache gets more at a time. transformers' own layer has none to spare and copies all of itself
# at every step. On a CPU that costs what it brings (the copy is read from a warm cache: 0.98 to 1.05 of the time, within the
# noise); rows that change places in the middle need it.
SPARE_COLUMNS = 64

# Weights of a network up to which a CPU lays its linear layers out a second time while answers are written: 1 GiB more.
MOST_PACKED = 2**28
