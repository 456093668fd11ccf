"""Every touch of an SGLang internal: one file per concern, `patch.Touch` per symbol.

====================  ========================================================================
``schedule_context``  the schedule batch of a forward pass, for the backend
``graph_labels``      decode graphs under several labels
``rank_agreement``    what ranks tell each other before a step of DP attention
``radix_paths``       where requests stand in the radix tree
``resolution``        SGLang's arguments, resolved as if our name had not been given
``stock_backend``     the backend to delegate to, SGLang's settings, its decode attention on a CPU
``attention_layers``  a model's attention layers, wherever it keeps them
``kv_pool``           what a KV pool holds, and writing to it
``observability``     the decode log line, ``/server_info``, the labels of metrics
``load_generator``    SGLang's own load generator and frontend language, for ``bench serving``
``attributes``        what is read of SGLang's objects, and in which releases it is there
``install``           checks and applies what the backend needs
====================  ========================================================================
"""
