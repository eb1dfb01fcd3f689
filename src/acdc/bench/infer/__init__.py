"""``acdc bench infer``: the sparse runtime beside other runtimes, each in a process of its own."""
