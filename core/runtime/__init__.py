"""The engine: requests, blocks, scheduler, paged cache, decoder steps, sampling."""
