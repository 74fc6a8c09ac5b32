"""The worker on a GPU: the same messages as on a CPU, obeyed by streams instead of the host.

    CPU    receive -> pack -> launch -> receive -> ...                   never waits for the device,
                                                                         but for tokens of grammars
    main   upload | expand | forward | sample | signal | tokens to host  steps, tails, relocations
    side   wait | gather KV out of peers                                 pre-copies
    host   wait | KV to pinned host memory, and back                     displaced requests

Order between ranks is kept by words in symmetric memory that streams write and wait for; see
`signals`. What only integers decide (buckets, packing, memory, which unit waits for what) is in
modules without device code, so that it is tested anywhere.
"""
