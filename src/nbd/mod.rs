//! NBD client: fixed newstyle, structured replies, metadata contexts, credit-limited reads.
