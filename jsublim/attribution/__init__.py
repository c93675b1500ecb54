"""Attribution patching: at which layers and tokens a teacher's divergence comes about (section 5 of the paper)."""
