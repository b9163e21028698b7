// SPDX-License-Identifier: Apache-2.0
/*
 * The backend of the benchmarks: one thread, one epoll loop, no allocation per
 * connection. It has to cost less than any proxy in front of it.
 *
 *   load_server echo          sends back what comes
 *   load_server source [PACE] sends for ever, reads nothing; at most PACE bytes/s each
 *   load_server discard       reads for ever, sends nothing
 *   load_server http BODY     answers every request head with BODY bytes; keeps
 *                             the connection unless "Connection: close" is asked
 *
 * Prints the port it listens on. Requests must have no body.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_FDS 65536
#define EVENTS 512
#define HEAD_ROOM 4096

struct connection {
	unsigned held; /* bytes of an unfinished head */
	char head[HEAD_ROOM];
};

static struct connection *connections[MAX_FDS];
static char buffer[256 * 1024];
static char answer_keep[128 * 1024], answer_close[128 * 1024];
static size_t answer_keep_size, answer_close_size;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* sends all of it, or gives the connection up: our clients read what they asked for */
static bool send_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

		if (sent < 0) {
			if (errno == EINTR)
				continue;
			if (errno == EAGAIN) {
				struct timeval patience = { .tv_usec = 1000 };

				select(0, NULL, NULL, NULL, &patience);
				continue;
			}
			return false;
		}
		data += sent;
		size -= sent;
	}
	return true;
}

/* answers every whole head in `data`; what is left over stays in c->head */
static bool serve_http(int fd, struct connection *c, const char *data, size_t size)
{
	char joined[HEAD_ROOM + sizeof(buffer)];

	if (c->held) {
		memcpy(joined, c->head, c->held);
		memcpy(joined + c->held, data, size);
		data = joined;
		size += c->held;
		c->held = 0;
	}
	for (;;) {
		const char *end = memmem(data, size, "\r\n\r\n", 4);
		bool close_after;

		if (!end)
			break;
		close_after = memmem(data, end - data, "onnection: close", 16) != NULL;
		if (!send_all(fd, close_after ? answer_close : answer_keep,
			      close_after ? answer_close_size : answer_keep_size))
			return false;
		if (close_after)
			return false;
		size -= end + 4 - data;
		data = end + 4;
	}
	if (size > HEAD_ROOM)
		return false;
	memcpy(c->head, data, size);
	c->held = size;
	return true;
}

/* as much as fits; false when the client has gone */
static bool pour(int fd)
{
	for (int n = 0; n < 16; n++) {
		ssize_t sent = send(fd, buffer, sizeof(buffer), MSG_NOSIGNAL);

		if (sent < 0)
			return errno == EAGAIN || errno == EINTR;
	}
	return true;
}

static void make_answers(int body)
{
	char *text = calloc(1, body + 1);

	memset(text, 'x', body);
	answer_keep_size = snprintf(answer_keep, sizeof(answer_keep),
				    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
				    "Content-Length: %d\r\n\r\n%s", body, text);
	answer_close_size = snprintf(answer_close, sizeof(answer_close),
				     "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
				     "Content-Length: %d\r\nConnection: close\r\n\r\n%s", body, text);
	free(text);
}

int main(int argc, char **argv)
{
	bool http = argc > 1 && !strcmp(argv[1], "http");
	bool source = argc > 1 && !strcmp(argv[1], "source");
	bool discard = argc > 1 && !strcmp(argv[1], "discard");
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct rlimit files = { 20000, 20000 };
	struct epoll_event events[EVENTS], event;
	socklen_t size = sizeof(address);
	unsigned long pace = source && argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	int one = 1, listener, ep;

	make_answers(argc > 2 ? atoi(argv[2]) : 128);
	setrlimit(RLIMIT_NOFILE, &files);
	listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) || listen(listener, 4096))
		die("listen");
	getsockname(listener, (void *)&address, &size);
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	ep = epoll_create1(0);
	event.events = EPOLLIN;
	event.data.fd = listener;
	epoll_ctl(ep, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(ep, events, EVENTS, -1);

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;
			ssize_t got;
			bool keep;

			if (fd == listener) {
				for (int n = 0; n < 64; n++) {
					int client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);

					if (client < 0)
						break;
					if (client >= MAX_FDS) {
						close(client);
						continue;
					}
					setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
					if (pace)
						setsockopt(client, SOL_SOCKET, SO_MAX_PACING_RATE, &pace, sizeof(pace));
					if (!connections[client])
						connections[client] = malloc(sizeof(struct connection));
					connections[client]->held = 0;
					event.events = source ? EPOLLOUT : EPOLLIN;
					event.data.fd = client;
					epoll_ctl(ep, EPOLL_CTL_ADD, client, &event);
				}
				continue;
			}
			if (source) {
				if ((events[i].events & (EPOLLHUP | EPOLLERR)) || !pour(fd))
					close(fd);
				continue;
			}
			got = recv(fd, buffer, sizeof(buffer), 0);
			if (got < 0 && (errno == EAGAIN || errno == EINTR))
				continue;
			keep = got > 0;
			if (keep && !discard)
				keep = http ? serve_http(fd, connections[fd], buffer, got)
					    : send_all(fd, buffer, got);
			if (!keep)
				close(fd);
		}
	}
}
