"""Program calls: making them on any executor, retrying, pacing, counting and ending them."""
