"""One figure of a paper a page: attention, feed-forward, the recurrent block, the image encoder."""
