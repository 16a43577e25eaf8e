VERSION = "1.0.0"  # of this build; whoever packs it may write another
