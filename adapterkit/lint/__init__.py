"""Problems of adapter folders in a repository, and the forms in which other programs take them."""
