/* All programs in one unit, so that one compilation serves them and every map is declared once. UAPI headers only. */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/socket.h>
#include <linux/types.h>

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_DGRAM 2

#include "mesh_types.h"
#include "mesh_maps.h"
#include "mesh_accelerate.h"
#include "mesh_helpers.h"
#include "mesh_balance.h"
#include "mesh_flows.h"
#include "mesh_connect.c"
#include "mesh_datagram.c"
#include "mesh_accelerate.c"
#include "mesh_sockops.c"
#include "mesh_sockopt.c"
#include "mesh_sk_lookup.c"
#include "mesh_hold.c"
