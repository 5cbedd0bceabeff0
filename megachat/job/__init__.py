"""Starting, joining and supervising the ranks of a job."""
