"""All that touches bpf(2) and sock_diag: loader, links, records, queue age, steering, splicing."""
